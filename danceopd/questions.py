"""What one teacher is asked about: rows of conditions, each with its layout and its noise schedule.

The loop works on anything with these four methods, in memory (`Questions`) or on disk. Rows of one layout stack into
a batch, whichever teacher they belong to; schedules may differ between picture sizes. Objectives that learn from
pictures, not from a teacher alone, need rows that also have a target (`targets`): the clean latents.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition, stack


class Work(Protocol):
    """The questions of one teacher, numbered from 0."""

    def __len__(self) -> int: ...

    def layout(self, row: int) -> Hashable:
        """Equal for rows that share a batch."""
        ...

    def sigmas(self, row: int) -> Tensor:
        """The row's noise schedule (N+1,) fp32 on the CPU, falling to 0."""
        ...

    def rows(self, index: list[int]) -> Condition:
        """These rows, all of one layout, stacked in this order, on the CPU."""
        ...


@runtime_checkable
class Targets(Protocol):
    """Questions that have right answers: a clean picture for each row, as latents."""

    def targets(self, index: list[int]) -> Tensor:
        """Clean latents (len(index), *shape) fp32 on the CPU, in this order; the rows are of one layout."""
        ...


class Questions:
    """Questions in memory: a list of (condition, sigmas), each of one layout, their rows numbered on end."""

    def __init__(self, buckets: Sequence[tuple[Condition, Tensor]]) -> None:
        if not buckets:
            raise ValueError("questions need at least one bucket")
        self.buckets = list(buckets)
        self._ends = list(accumulate(len(condition) for condition, _ in self.buckets))

    def __len__(self) -> int:
        return self._ends[-1]

    def layout(self, row: int) -> Hashable:
        return self.buckets[self._place(row)[0]][0].layout

    def sigmas(self, row: int) -> Tensor:
        return self.buckets[self._place(row)[0]][1]

    def rows(self, index: list[int]) -> Condition:
        places = [self._place(row) for row in index]
        parts = [self.buckets[b][0].rows([r for _, r in run]) for b, run in _runs(places)]
        return stack(parts)

    def _place(self, row: int) -> tuple[int, int]:
        """Which bucket a row is in, and which of its rows it is."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        bucket = next(b for b, end in enumerate(self._ends) if row < end)
        return bucket, row - self._ends[bucket] + len(self.buckets[bucket][0])


class TargetedQuestions(Questions):
    """Questions in memory with the clean latents of their right answers, (rows, *shape) for each bucket."""

    def __init__(self, buckets: Sequence[tuple[Condition, Tensor]], clean: Sequence[Tensor]) -> None:
        super().__init__(buckets)
        if [c.shape for c in clean] != [(len(condition), *condition.shape) for condition, _ in buckets]:
            raise ValueError("targets need one clean latent of the condition's shape for each row")
        self._clean = list(clean)

    def targets(self, index: list[int]) -> Tensor:
        places = [self._place(row) for row in index]
        return torch.stack([self._clean[bucket][row] for bucket, row in places])


def alike(work: Work, count: int) -> list[int]:
    """Up to `count` of the first rows that have the layout of row 0: a batch to look at."""
    near = range(min(len(work), 64 * count))
    return [row for row in near if work.layout(row) == work.layout(0)][:count]


def unprompted(condition: Condition, null: Condition) -> Condition:
    """`condition` with the prompts of `null` (one row, or as many), everything else its own."""
    if len(null) not in (1, len(condition)):
        raise ValueError(f"the null condition has {len(null)} rows; give 1 or {len(condition)}")
    kwargs = dict(condition.kwargs)
    for key in FAMILIES[condition.family].prompt_kwargs:
        value = null.kwargs[key]
        kwargs[key] = None if value is None else value.expand(len(condition), *value.shape[1:]).clone()
    return replace(condition, kwargs=kwargs)


def _runs(places: list[tuple[int, int]]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Consecutive places of one bucket together."""
    runs: list[tuple[int, list[tuple[int, int]]]] = []
    for place in places:
        if not runs or runs[-1][0] != place[0]:
            runs.append((place[0], []))
        runs[-1][1].append(place)
    return runs
