"""What a teacher could be given that makes losing samples into winners (OPID, arXiv 2606.26790, carried over).

For each question the worst sample's rollout is taken up again where good and bad samples parted, and finished by the
frozen teacher twice: as it is always asked, and with a context that the student does not have (guidance, a longer
caption). The rewards rank both ends among the samples. A context that made more winners than the teacher alone did, by
more than chance, is given to the teacher in later updates; it is counted by teacher, in checkpoints and `skills.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danceopd.common.rng import stream
from danceopd.engine.batches import Batch, TeacherContext
from danceopd.engine.rollout import rollout
from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.gates.variants import EXPANDED
from danceopd.labelfree.nft.skills import LEAST, MEMORY
from danceopd.labelfree.rewards import Group
from danceopd.models.fields import GuidedField, VelocityField, acting, unguided
from danceopd.pipelines.condition import stack
from danceopd.pipelines.registry import with_prompt_of
from danceopd.recipe.nft import NFT

PLAIN = {"guided": "guidance", "caption": "a longer caption"}
"""Contexts in the words of a sentence."""
_STATE = "nft.contexts"
_TRIED, _ALONE, _GIVEN, _DIFFER = range(4)


@dataclass(frozen=True)
class Loser:
    """A group's worst sample: its `row` of the batch, and the `step` of its rollout from which it is done again.

    `group` are the samples that both new ends are ranked among.
    """

    row: int
    step: int
    state: Tensor
    group: Group


class Contexts:
    """Tries contexts on losers, counts by teacher, and says what each teacher is given.

    `scores(groups, teachers)` are the rewards' standard scores (Q, S) of Q groups of S samples, by teacher index.
    """

    def __init__(
        self, options: NFT, teachers: Sequence[RoutedTeacher],
        scores: Callable[[Sequence[Group], Sequence[int]], Tensor],
    ) -> None:  # fmt: skip
        self.names: Sequence[str] = options.contexts
        self.scale, self.teachers, self.scores = options.context_scale, teachers, scores
        self.sums = torch.zeros(len(teachers), len(self.names), 4, dtype=torch.float64)
        self._noted = torch.zeros_like(self.sums)

    def given(self, teacher: int) -> str | None:
        """The context that a teacher is asked with from what was seen so far; None: no one earned it."""
        best = max(range(len(self.names)), key=lambda c: self._gain(teacher, c)[0])
        gain, error = self._gain(teacher, best)
        return self.names[best] if gain > 1.96 * error else None

    def _gain(self, teacher: int, context: int) -> tuple[float, float]:
        """How much larger the share of winners is with the context than alone, and its standard error."""
        tried, alone, given, differ = self.sums[teacher, context].tolist()
        if tried < LEAST:
            return -1.0, 0.0
        gain = (given - alone) / tried
        return gain, math.sqrt(max(0.0, differ / tried - gain**2) / tried)

    def of_batch(self, batch: Batch, samples: Sequence[int]) -> TeacherContext | None:
        """What the batch's teachers are given; `samples` are the rows' numbers in their teachers' data."""
        given = {m: self.given(m) for m in set(batch.teacher_index)}
        if not any(given.values()):
            return None
        rows = [
            self._caption(batch, row, samples[row]) if given[m] == "caption" else batch.condition.rows([row])
            for row, m in enumerate(batch.teacher_index)
        ]
        condition = stack(rows) if "caption" in given.values() else batch.condition
        return TeacherContext(condition, {m: self._field(m, "guided") for m, one in given.items() if one == "guided"})

    def try_on(self, batch: Batch, losers: Sequence[Loser], samples: Sequence[int]) -> None:
        """Finish each loser twice, by its teacher alone and with one context, and note which end wins."""
        asked: dict[tuple[int, int, str], list[Loser]] = {}
        for loser in losers:
            numbers = stream(batch.seed, batch.step, f"context/{batch.name}/{batch.rows[loser.row]}")
            name = self.names[int(numbers.integers(len(self.names)))]
            m = batch.teacher_index[loser.row]
            if name != "caption" or self._has_caption(m, samples[loser.row]):
                asked.setdefault((m, loser.step, name), []).append(loser)
        for (m, step, name), some in asked.items():
            rows = [loser.row for loser in some]
            plain = batch.condition.rows(rows)
            condition = plain
            if name == "caption":
                condition = stack([self._caption(batch, row, samples[row]) for row in rows])
            ends = []
            for field, asks in ((self.teachers[m].field, plain), (self._field(m, name), condition)):
                x = torch.stack([loser.state for loser in some]).to(batch.device)
                stop = torch.full((len(x),), len(batch.sigmas) - 1 - step)
                with acting(field):
                    ends.append(rollout(field, x, batch.sigmas[step:], stop, asks))
            pairs = torch.stack(ends, 1)
            groups = [
                Group(torch.cat([loser.group.clean, pair]), loser.group.condition, loser.group.seed)
                for loser, pair in zip(some, pairs)
            ]
            scores = self.scores(groups, [m] * len(groups)).cpu()
            alone, given = (scores[:, -2:] > scores[:, :-2].mean(1, keepdim=True)).double().T
            seen = torch.stack([torch.ones_like(alone), alone, given, (alone != given).double()], 1)
            self._noted[m, self.names.index(name)] += seen.sum(0)

    def _field(self, teacher: int, name: str) -> VelocityField:
        """The field that answers with a context; under a longer caption it is the teacher's own."""
        one = self.teachers[teacher]
        if name == "caption":
            return one.field
        assert one.null is not None  # a merge records it where contexts have `guided`
        return GuidedField(unguided(one.field), one.null, self.scale)

    def _has_caption(self, teacher: int, sample: int) -> bool:
        data = self.teachers[teacher].variants.get(EXPANDED)
        return data is not None and data.layout(sample) is not None

    def _caption(self, batch: Batch, row: int, sample: int) -> Any:
        """A row's condition with its longer caption, where it has one."""
        mine, m = batch.condition.rows([row]), batch.teacher_index[row]
        if not self._has_caption(m, sample):
            return mine
        return with_prompt_of(mine, self.teachers[m].variants[EXPANDED].rows([sample]).to(batch.device))

    def fold(self, all_reduce: Callable[[Tensor], None], device: torch.device) -> None:
        """End an update; `all_reduce` sums a tensor over the processes, in place. Old trials fade."""
        noted = self._noted.float().to(device)
        all_reduce(noted)
        self._noted.zero_()
        self.sums += noted.cpu().double()
        self.sums *= (MEMORY / self.sums[..., :1].clamp(min=MEMORY)).clamp(max=1)

    def facts(self) -> dict[str, Any]:
        """By teacher and context: trials, shares of winners with it and without, and whether it is given."""
        found: dict[str, Any] = {}
        for m, teacher in enumerate(self.teachers):
            given = self.given(m)
            for name, (tried, alone, won, _) in zip(self.names, self.sums[m].tolist()):
                if tried:
                    found.setdefault(teacher.name, {})[name] = {
                        "tried": round(tried), "winners": round(won / tried, 4),
                        "winners of the teacher alone": round(alone / tried, 4), "given": name == given,
                    }  # fmt: skip
        return found

    def sentences(self) -> dict[str, list[str]]:
        """The same in plain words, by teacher: a sentence for each context with enough trials."""
        found: dict[str, list[str]] = {}
        for teacher, contexts in self.facts().items():
            for name, one in contexts.items():
                if one["tried"] >= LEAST:
                    end = "it is given to the teacher" if one["given"] else "it is not given"
                    found.setdefault(teacher, []).append(
                        f"With {PLAIN[name]} {teacher} made {one['winners']:.0%} of the losing samples into winners, "
                        f"alone {one['winners of the teacher alone']:.0%} ({one['tried']} tried): {end}."
                    )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{_STATE}.sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor] | Any) -> None:
        self.sums = state[f"{_STATE}.sums"].clone()
        self._noted.zero_()
