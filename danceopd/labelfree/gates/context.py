"""Under which other conditions the rows of an update are queried: no prompt, a wrong one, paraphrases, privileged
context.

A teacher's rows exist under other conditions, by name, as its `variants`. From these, and from the other rows of the
update, `StepContext` makes the `BatchContext` of each batch. Everything is a function of (seed, step) and the whole
update: a slice of the rows is queried as the whole would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from danceopd.data.dataset import Dataset
from danceopd.engine.batches import Draw
from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.gates.skills import CriticalDraws, Guide, draw_critical
from danceopd.labelfree.gates.variants import DEGRADED, EXPANDED, KEEP, PARAPHRASE
from danceopd.pipelines.condition import Condition, stack
from danceopd.pipelines.registry import FAMILIES, with_prompt_of
from danceopd.recipe.labelfree import Gates

NULL, WRONG, ELSEWHERE, PRIVILEGED = "null", "wrong", "elsewhere", "privileged"
"""The null prompt, another row's prompt, another row's source, a context that the student does not see."""
CONTRASTS = {"null": NULL, "prompt": WRONG, "source": ELSEWHERE}
NEAR = 4
"""First rows of the data, always there, among which a wrong prompt is sought when the update holds none."""


@dataclass(frozen=True)
class AlternativeCondition:
    """Some rows of a batch under other conditions, one for each of `rows`."""

    rows: list[int]
    condition: Condition


@dataclass
class BatchContext:
    """The other conditions of a batch's B rows.

    `others` by name: `NULL`, `WRONG`, `ELSEWHERE`, `PRIVILEGED`, and paraphrases. `conditional` (B,) bool are the rows
    with a prompt, `contrasts` names each row's contrast, `guided` are the rows whose privileged context is guidance by
    the family's rule `guide`. `critical` (B,) bool rows are queried at critical steps, chosen by `keys` (B, steps);
    both lie on the CPU, where rollouts are planned. `grid` are rows and columns of tokens.
    """

    conditional: Tensor
    others: dict[str, AlternativeCondition]
    contrasts: list[str | None]
    guided: list[int]
    critical: Tensor
    keys: Tensor
    guide: Guide
    grid: tuple[int, int] | None = None


class StepContext:
    """The groups of one update, and the conditions that they can be queried under."""

    def __init__(
        self, gates: Gates, teachers: Sequence[RoutedTeacher], capabilities: Sequence[str], device: torch.device,
        seed: int, step: int, rollout_steps: int, draw: Draw,
    ) -> None:  # fmt: skip
        self.gates, self.teachers, self.capabilities, self.device = gates, teachers, capabilities, device
        self.teacher_index, self.sample_index = draw.teacher_index, draw.sample_index
        self.unconditional = draw.unconditional
        groups, options = len(draw.teacher_index), gates.skills
        if options is None:
            self.draws = CriticalDraws(
                np.zeros(groups, dtype=bool), np.zeros(groups, dtype=int), np.zeros((groups, rollout_steps))
            )
        else:
            self.draws = draw_critical(seed, step, groups, rollout_steps, options)

    def dataset(self, group: int) -> Dataset:
        """Where the student's condition of a group comes from: its data, or the same with a degraded source."""
        teacher = self.teachers[self.teacher_index[group]]
        return teacher.variants[self._degraded(group)] if self._privileged(group) == "source" else teacher.dataset

    def of_batch(self, rows: Sequence[int], layout: Sequence[int], condition: Condition) -> BatchContext:
        """`rows` are the groups of the batch's rows, `layout` all groups of that layout, in order."""
        others: dict[str, AlternativeCondition] = {}
        contrasts = [self._contrast(g) for g in rows]
        privileged = [self._privileged(g) for g in rows]
        prompted = [i for i, g in enumerate(rows) if not self.unconditional[g]]
        guided = [i for i in prompted if privileged[i] == "guided"]

        def add(name: str, where: list[int], made: list[Condition], source: bool = False) -> None:
            """The rows at `where` with the prompts of `made`, or their own prompts on the sources of `made`."""
            if where:
                other, mine = stack(made).to(self.device), condition.rows(where)
                found = with_prompt_of(other, mine) if source else with_prompt_of(mine, other)
                others[name] = AlternativeCondition(where, found)

        null = [i for i in prompted if contrasts[i] == NULL or privileged[i] == "guided"]
        add(NULL, null, [self._null(rows[i]) for i in null])
        partners = {i: self._partner(rows[i], layout) for i in prompted}
        wrong = [i for i in prompted if contrasts[i] == WRONG or self.gates.consensus is not None]
        for name, where in ((WRONG, wrong), (ELSEWHERE, [i for i in prompted if contrasts[i] == ELSEWHERE])):
            pairs = [(i, partner) for i in where if (partner := partners[i]) is not None]
            made = [self._row(rows[i], partner) for i, partner in pairs]
            add(name, [i for i, _ in pairs], made, source=name == ELSEWHERE)
        paraphrases = [n for t in self.teachers for n in t.variants if PARAPHRASE in n] if self.gates.consensus else []
        for name in dict.fromkeys(paraphrases):
            where = [i for i in prompted if self._has(rows[i], name)]
            add(name, where, [self._variant(rows[i], name) for i in where])
        where = [i for i in prompted if privileged[i] in ("caption", "source")]
        if where:
            parts = []
            for i in where:
                g = rows[i]
                if privileged[i] == "caption":
                    longer = self._variant(g, EXPANDED).to(self.device)
                    parts.append(with_prompt_of(condition.rows([i]), longer))
                else:
                    parts.append(self._row(g, self.sample_index[g]).to(self.device))
            others[PRIVILEGED] = AlternativeCondition(where, stack(parts))
        family = FAMILIES[condition.family]
        return BatchContext(
            conditional=_marked(len(rows), prompted).to(self.device),
            others=others,
            contrasts=contrasts,
            guided=guided,
            critical=_marked(len(rows), [i for i in prompted if self.draws.critical[rows[i]]]),
            keys=torch.from_numpy(self.draws.keys[list(rows)]),
            guide=family.guide,
            grid=family.grid(condition),
        )

    def _capability(self, group: int) -> str:
        return self.capabilities[self.teacher_index[group]]

    def _contrast(self, group: int) -> str | None:
        name = None if self.unconditional[group] else self.gates.contrast(self._capability(group))
        return None if name is None else CONTRASTS[name]

    def _privileged(self, group: int) -> str:
        """The privileged context of the group's teacher: source, guided, caption or none."""
        options = self.gates.skills
        if options is None or not options.eta or self.unconditional[group]:
            return "none"
        context = options.privileged(self._capability(group))
        name = context.step if self.draws.critical[group] else context.episode
        return "none" if name == "caption" and not self._has(group, EXPANDED) else name

    def _degraded(self, group: int) -> str:
        assert self.gates.skills is not None
        return DEGRADED + self.gates.skills.degrade[self.draws.kind[group]]

    def _has(self, group: int, name: str) -> bool:
        data = self.teachers[self.teacher_index[group]].variants.get(name)
        return data is not None and data.layout(self.sample_index[group]) is not None

    def _variant(self, group: int, name: str) -> Condition:
        return self.teachers[self.teacher_index[group]].variants[name].rows([self.sample_index[group]])

    def _row(self, group: int, row: int) -> Condition:
        """A row of the group's teacher, as it is."""
        return self.teachers[self.teacher_index[group]].dataset.rows([row])

    def _null(self, group: int) -> Condition:
        null = self.teachers[self.teacher_index[group]].null
        if null is None:
            return self._variant(group, KEEP)
        return null if len(null) == 1 else null.rows([self.sample_index[group]])

    def _partner(self, group: int, layout: Sequence[int]) -> int | None:
        """Another sample of the group's teacher, of its layout: the update's next, else one of the data's first."""
        m, mine = self.teacher_index[group], self.sample_index[group]
        place = list(layout).index(group)
        for other in (*layout[place + 1 :], *layout[:place]):
            if self.teacher_index[other] == m and not self.unconditional[other] and self.sample_index[other] != mine:
                return self.sample_index[other]
        data = self.teachers[m].dataset
        near = range(min(NEAR, len(data)))
        return next((row for row in near if row != mine and data.layout(row) == data.layout(mine)), None)


def _marked(count: int, rows: Sequence[int]) -> Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[list(rows)] = True
    return found
