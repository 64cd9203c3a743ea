"""What the rows of an update are asked as besides: without a prompt, with a wrong one, in other words, or told more.

A `Source` of the loop has its questions and, by name, the same rows in other words or with a degraded source (`also`,
see variants.py). From these, and from the other rows of the update, each lesson gets its `Gating`. Everything is a
function of (seed, step) and the whole update: a slice of the rows is asked what the whole would have been asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from danceopd.errors import UserError
from danceopd.gates import Running
from danceopd.gating import ELSEWHERE, NULL, TOLD, WRONG, As, Gating
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition, stack
from danceopd.questions import Work, unprompted
from danceopd.recipe import Recipe
from danceopd.skills import Draws, draws
from danceopd.variants import DEGRADED, EXPANDED, FRAMING, KEEP

if TYPE_CHECKING:
    from danceopd.loop import Source

CONTRASTS = {"null": NULL, "prompt": WRONG, "source": ELSEWHERE}
NEAR = 4
"""Rows of the data's beginning, always there, among which a wrong prompt is sought when the update holds none."""


class Contexts:
    """The gates of a run: its running means, and what its teachers' rows can be asked as."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], device: torch.device) -> None:
        self.recipe, self.gates, self.sources, self.device = recipe, recipe.gates, list(sources), device
        self.running = Running(len(sources), device)
        capability = {teacher.name: teacher.capability for teacher in recipe.teachers}
        self.capabilities = [capability[source.name] for source in sources]
        for source, task in zip(sources, self.capabilities, strict=True):
            if self.gates.null(task) and source.null is None and KEEP not in source.also:
                raise UserError(f"gates ask the null prompt, and teacher {source.name!r} has none; leave them out")

    def update(self, step: int, routes: Sequence[int], picks: Sequence[int], blank: np.ndarray) -> Update:
        """What one update's units are asked: of teacher `routes`, question `picks`, `blank` without a prompt."""
        return Update(self, step, routes, picks, blank)


class Update:
    """The units of one update; see `Contexts.update`."""

    def __init__(
        self, contexts: Contexts, step: int, routes: Sequence[int], picks: Sequence[int], blank: np.ndarray
    ) -> None:
        self.contexts, self.gates, self.sources = contexts, contexts.gates, contexts.sources
        self.routes, self.picks, self.blank = routes, picks, [bool(b) for b in blank]
        recipe, knobs = contexts.recipe, contexts.gates.skills
        units, steps = len(routes), recipe.rollout.steps
        nobody = Draws(np.zeros(units, dtype=bool), np.zeros(units, dtype=int), np.zeros((units, steps)))
        self.draws = nobody if knobs is None else draws(recipe.seed, step, units, steps, knobs)

    def work(self, u: int) -> Work:
        """What unit `u`'s student is asked: its question, or the same with a degraded source."""
        source = self.sources[self.routes[u]]
        return source.also[self._degraded(u)] if self._told(u) == "source" else source.questions

    def gating(self, rows: Sequence[int], group: Sequence[int], condition: Condition) -> Gating:
        """What the gates need of a lesson: `rows` are its rows' units, `group` all units of its layout, in order."""
        asked: dict[str, As] = {}
        contrasts = [self._contrast(u) for u in rows]
        told = [self._told(u) for u in rows]
        prompted = [i for i, u in enumerate(rows) if not self.blank[u]]
        guided = [i for i in prompted if told[i] == "guided"]

        def also(name: str, where: list[int], made: list[Condition], source: bool = False) -> None:
            """Ask the rows at `where` with the prompts of `made`, or their own prompts on the sources of `made`."""
            if where:
                other, mine = stack(made).to(self.contexts.device), condition.rows(where)
                asked[name] = As(where, unprompted(other, mine) if source else unprompted(mine, other))

        null = [i for i in prompted if contrasts[i] == NULL or told[i] == "guided"]
        also(NULL, null, [self._null(rows[i]) for i in null])
        partners = {i: self._partner(rows[i], group) for i in prompted}
        wrong = [i for i in prompted if contrasts[i] == WRONG or self.gates.consensus is not None]
        for name, where in ((WRONG, wrong), (ELSEWHERE, [i for i in prompted if contrasts[i] == ELSEWHERE])):
            pairs = [(i, partner) for i in where if (partner := partners[i]) is not None]
            made = [self._question(rows[i], partner) for i, partner in pairs]
            also(name, [i for i, _ in pairs], made, source=name == ELSEWHERE)
        framings = [] if self.gates.consensus is None else [n for s in self.sources for n in s.also if FRAMING in n]
        for name in dict.fromkeys(framings):
            where = [i for i in prompted if self._has(rows[i], name)]
            also(name, where, [self._other(rows[i], name) for i in where])
        where = [i for i in prompted if told[i] in ("caption", "source")]
        if where:
            parts = []
            for i in where:
                u = rows[i]
                if told[i] == "caption":
                    longer = self._other(u, EXPANDED).to(self.contexts.device)
                    parts.append(unprompted(condition.rows([i]), longer))
                    continue
                parts.append(self._question(u, self.picks[u]).to(self.contexts.device))
            asked[TOLD] = As(where, stack(parts))
        family = FAMILIES[condition.family]
        return Gating(
            gates=self.gates,
            running=self.contexts.running,
            gated=_marked(len(rows), prompted).to(self.contexts.device),
            asked=asked,
            contrasts=contrasts,
            guided=guided,
            critical=_marked(len(rows), [i for i in prompted if self.draws.critical[rows[i]]]),
            keys=torch.from_numpy(self.draws.keys[list(rows)]),
            guide=family.guide,
            grid=family.grid(condition),
        )

    def _capability(self, u: int) -> str:
        return self.contexts.capabilities[self.routes[u]]

    def _contrast(self, u: int) -> str | None:
        name = None if self.blank[u] else self.gates.contrast(self._capability(u))
        return None if name is None else CONTRASTS[name]

    def _told(self, u: int) -> str:
        """What the unit's teacher is told besides: source, guided, caption or none."""
        knobs = self.gates.skills
        if knobs is None or not knobs.eta or self.blank[u]:
            return "none"
        told = knobs.told(self._capability(u))
        name = told.step if self.draws.critical[u] else told.episode
        return "none" if name == "caption" and not self._has(u, EXPANDED) else name

    def _degraded(self, u: int) -> str:
        assert self.gates.skills is not None
        return DEGRADED + self.gates.skills.degrade[self.draws.kind[u]]

    def _has(self, u: int, name: str) -> bool:
        work = self.sources[self.routes[u]].also.get(name)
        return work is not None and work.layout(self.picks[u]) is not None

    def _other(self, u: int, name: str) -> Condition:
        return self.sources[self.routes[u]].also[name].rows([self.picks[u]])

    def _question(self, u: int, row: int) -> Condition:
        """A question of the unit's teacher, as it is."""
        return self.sources[self.routes[u]].questions.rows([row])

    def _null(self, u: int) -> Condition:
        source = self.sources[self.routes[u]]
        if source.null is None:
            return self._other(u, KEEP)
        return source.null if len(source.null) == 1 else source.null.rows([self.picks[u]])

    def _partner(self, u: int, group: Sequence[int]) -> int | None:
        """Another question of the unit's teacher, of its layout: the update's next, else one of the data's first."""
        m, mine = self.routes[u], self.picks[u]
        place = list(group).index(u)
        for other in (*group[place + 1 :], *group[:place]):
            if self.routes[other] == m and not self.blank[other] and self.picks[other] != mine:
                return self.picks[other]
        work = self.sources[m].questions
        near = range(min(NEAR, len(work)))
        return next((row for row in near if row != mine and work.layout(row) == work.layout(mine)), None)


def _marked(count: int, rows: Sequence[int]) -> Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[list(rows)] = True
    return found
