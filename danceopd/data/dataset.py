"""What one teacher's rows are: conditions, each with its layout and its noise schedule.

In: a recipe's data sources. Out: for each teacher the opened data and the rows that the run will sample
(`TeacherData`), and, once encoded, its conditions as a `Dataset`: in the cache (`CachedConditions`), or, in tests and
benchmarks, in memory (`ConditionDataset`). Rows of one layout stack into a batch, whichever teacher they belong to;
schedules may differ between picture sizes. Objectives that learn from finished pictures need rows that also have a
target, the clean latents (`HasTargets`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from danceopd.common.cache import check_cache
from danceopd.data.bank.rows import Setting, bank_data, is_auto
from danceopd.data.routing import draws_all, sample_batch, samples_by_need
from danceopd.data.sources import Prompts, edits_from, prompts_from
from danceopd.data.store import Store
from danceopd.errors import UserError
from danceopd.pipelines.condition import Condition, stack
from danceopd.recipe.parts import Columns
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.sampling import Sampling

Size = tuple[int, int]
"""Height and width in pixels."""
PROOF_ROWS = 4
"""First rows of each teacher's data that are encoded whether they are sampled or not: the export is proven on them."""


class Dataset(Protocol):
    """The conditions of one teacher, numbered from 0."""

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
class HasTargets(Protocol):
    """A dataset with a finished picture for each row, as latents."""

    def targets(self, index: list[int]) -> Tensor:
        """Clean latents (len(index), *shape) fp32 on the CPU, in this order; the rows are of one layout."""
        ...


class ConditionDataset:
    """A dataset in memory: a list of (condition, sigmas), each of one layout, their rows numbered on end."""

    def __init__(self, buckets: Sequence[tuple[Condition, Tensor]]) -> None:
        if not buckets:
            raise ValueError("a dataset needs at least one bucket")
        self.buckets = list(buckets)
        self._ends = list(accumulate(len(condition) for condition, _ in self.buckets))

    def __len__(self) -> int:
        return self._ends[-1]

    def layout(self, row: int) -> Hashable:
        return self.buckets[self._place(row)[0]][0].layout

    def sigmas(self, row: int) -> Tensor:
        return self.buckets[self._place(row)[0]][1]

    def rows(self, index: list[int]) -> Condition:
        runs = groupby(map(self._place, index), lambda place: place[0])
        return stack([self.buckets[bucket][0].rows([row for _, row in run]) for bucket, run in runs])

    def _place(self, row: int) -> tuple[int, int]:
        """Which bucket a row is in, and which of its rows it is."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        bucket = next(b for b, end in enumerate(self._ends) if row < end)
        return bucket, row - self._ends[bucket] + len(self.buckets[bucket][0])


def of_one_layout(dataset: Dataset, count: int) -> list[int]:
    """Up to `count` of the first rows that have the layout of row 0, for a batch to probe a model with."""
    near = range(min(len(dataset), 64 * count))
    return [row for row in near if dataset.layout(row) == dataset.layout(0)][:count]


Variant = tuple[Prompts, list[int]]
"""Data, and which rows of it are wanted."""


@dataclass(frozen=True)
class TeacherData:
    """The data of one teacher, opened and checked, and the rows of it that the run will sample.

    `variants` are the same rows under other conditions, by name, where a gate needs them (labelfree/gates/variants.py).
    """

    data: Prompts
    rows: list[int]
    variants: Mapping[str, Variant] = field(default_factory=dict)


def open_datasets(recipe: Recipe, alpha: bool = False) -> dict[str, TeacherData]:
    """Each teacher's data by its name, opened, with the rows that will be sampled; UserError for any faulty row.

    `alpha`: the model reads alpha channels. Where the objective learns from finished pictures, each sampled row must
    have one.
    """
    check_cache()
    targets = recipe.needs_targets
    opened: dict[tuple[str, str, Columns], Prompts] = {}
    keys = [(recipe.data_source(teacher), teacher.capability, recipe.columns(teacher)) for teacher in recipe.teachers]
    for key in dict.fromkeys(keys):
        source, capability, columns = key
        if is_auto(source):
            if targets:
                raise UserError(
                    f"the data of {capability} is auto, which has no finished pictures, and objective "
                    f"{recipe.objective} learns from such; name data that has them"
                )
            opened[key] = bank_data(source, capability, recipe.data.rows, Setting.of(recipe))
            continue
        read = edits_from if capability == "editing" else prompts_from
        opened[key] = read(source, recipe.data.rows, recipe.seed, check=False, targets=targets, columns=columns)
    _refuse_unused(recipe, {(key[2], opened[key].has_columns) for key in keys})
    data = [opened[key] for key in keys]
    sampled = sampled_rows(recipe.sampling, [len(d) for d in data])
    for found in opened.values():
        found.alpha = alpha
        rows = set().union(*(rows for d, rows in zip(data, sampled) if d is found))
        found.check(rows)
        if targets:
            found.check_targets(rows)
    return {t.name: TeacherData(d.worded(t.worded), sorted(rows)) for t, d, rows in zip(recipe.teachers, data, sampled)}


def _refuse_unused(recipe: Recipe, found: set[tuple[Columns, bool]]) -> None:
    """UserError where the recipe names columns, and no data that it names them for has any."""
    for columns in {columns for columns, _ in found}:
        if columns != Columns() and (columns, True) not in found:
            raise UserError("columns are named, and none of the data is a table; leave columns out")
    if recipe.data.columns != Columns() and recipe.data.columns not in {columns for columns, _ in found}:
        raise UserError("data.columns is set, and every teacher has its own; leave it out")


def sampled_rows(sampling: Sampling, lengths: Sequence[int]) -> list[set[int]]:
    """The rows of each teacher's data that the updates sample, and the first few, for proofs; see `draws_all`."""
    found = [
        set(range(length if draws_all(sampling, share, length) else min(PROOF_ROWS, length)))
        for share, length in zip(sampling.shares, lengths, strict=True)
    ]
    for step in range(sampling.steps):
        if all(len(mine) == length for mine, length in zip(found, lengths)):
            break
        if sampling.routing.per == "need":
            for mine, rows in zip(found, samples_by_need(sampling, step, lengths)):
                mine.update(rows)
            continue
        for teacher, row in zip(*sample_batch(sampling, step, lengths)):
            found[teacher].add(row)
    return found


class CachedConditions:
    """A dataset whose conditions lie in the cache on disk.

    `len` counts the rows of the data; only those that were encoded can be read. `layout` of another row is None.
    """

    def __init__(self, store: Store, length: int, keys: Mapping[int, str], sizes: Mapping[int, Size]) -> None:
        self._store, self._length, self._keys, self._sizes = store, length, dict(keys), dict(sizes)
        self._schedules: dict[Size, Tensor] = {}
        same: dict[Hashable, Hashable] = {}  # one tuple for all rows of a layout
        self._layouts = {row: same.setdefault(found, found) for row in keys if (found := self._one(row).layout)}

    def __len__(self) -> int:
        return self._length

    def layout(self, row: int) -> Hashable:
        return self._layouts.get(row)

    def size(self, row: int) -> Size:
        """(height, width) of the row's picture in pixels."""
        return self._sizes[row]

    def sigmas(self, row: int) -> Tensor:
        return self._schedules[self._sizes[row]]

    def rows(self, index: list[int]) -> Condition:
        return stack([self._one(row) for row in index])

    def _one(self, row: int) -> Condition:
        return Condition.from_state(self._store.row(self._keys[row]))


class CachedTargets(CachedConditions):
    """Cached conditions whose rows have finished pictures (`HasTargets`); `clean` are the keys of their latents."""

    def __init__(
        self, store: Store, length: int, keys: Mapping[int, str], sizes: Mapping[int, Size], clean: Mapping[int, str]
    ) -> None:
        super().__init__(store, length, keys, sizes)
        self._clean = dict(clean)

    def targets(self, index: list[int]) -> Tensor:
        return torch.stack([self._store.row(self._clean[row])["clean"] for row in index])
