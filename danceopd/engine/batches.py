"""Which rows an update learns from, as batches: rows that share a layout and a noise schedule.

Everything drawn is a function of (seed, step, row): a teacher and a sample for each group of rows, whether the prompt
is dropped, where the rollouts are queried, and their noise. So any slice of the rows draws what the whole would have
drawn: each process takes its share, `micro_batch` rows at a time, and the sum over processes is the update. A group is
one row, or the rollouts of one sample that Flow-OPD, DiffusionNFT or a gate compares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danceopd.common.rng import stream
from danceopd.data.dataset import HasTargets
from danceopd.data.routing import sample_batch
from danceopd.engine.callbacks import BatchHook, QueryHook
from danceopd.engine.query import draw_queries, place, step_weights
from danceopd.engine.teachers import RoutedTeacher
from danceopd.errors import UserError
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import Condition, stack
from danceopd.pipelines.registry import with_prompt_of
from danceopd.recipe.parts import Query
from danceopd.recipe.recipe import Recipe


@dataclass(frozen=True)
class Ranked:
    """Finished pictures of the student's own for a batch's B rows, and how good each is among those of its question.

    `clean` (B, …); `optimality` (B,) in [0, 1], 1/2 is neither good nor bad; `old` drew them. `weights(sigma)` (B,)
    weighs noise levels; `metrics` are figures by name, (B,) each, NaN where a figure means nothing for a row.
    """

    clean: Tensor
    optimality: Tensor
    old: VelocityField
    weights: Callable[[Tensor], Tensor] = torch.ones_like
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherContext:
    """What a batch's teachers know besides the student: `condition` of all rows, and `fields` by teacher index that
    answer in their place."""

    condition: Condition
    fields: Mapping[int, VelocityField]


@dataclass
class Batch:
    """The B `rows` of a layout that has `global_size` rows in the update; tensors of rows are (B, …), in order.

    `teacher_index` routes each row; `unconditional` rows have the null prompt (already in `condition`);
    `null_condition` is each row's null prompt where the student's rollout is guided. `sigmas` (N+1,) is the schedule.
    `query_draws` (B, K) become `query_step` (grid indices), `query_sigma` (noise levels) and `query_weight`. `targets`
    reads the clean latents. `name` tells this batch's random numbers from another's of the same step.
    """

    seed: int
    step: int
    name: str
    global_size: int
    rows: list[int]
    teacher_index: list[int]
    unconditional: list[bool]
    condition: Condition
    null_condition: Condition | None
    sigmas: Tensor
    query: Query
    query_draws: Tensor
    device: torch.device
    targets: Callable[[], Tensor] | None = None
    hook: BatchHook | None = None
    ranked: Ranked | None = None  # of objective nft: a hook gives them
    context: TeacherContext | None = None  # None: teachers are asked under the student's condition

    def __post_init__(self) -> None:
        self.set_queries(*place(self.query_draws, self.sigmas, self.query.law, self.query.jitter))

    def __len__(self) -> int:
        return len(self.rows)

    def set_queries(self, step: Tensor, sigma: Tensor) -> None:
        """Query the teachers at grid indices `step (B, K)`, noise levels `sigma (B, K)`."""
        self.query_step, self.query_sigma = step, sigma
        even = self.query.weight == "even"
        self.query_weight = torch.ones_like(sigma) if even else step_weights(step, sigma, self.sigmas)

    def noise(self, name: str = "noise") -> Tensor:
        """Standard normal latents (B, …) fp32 of this step; the same for the same name."""
        seed = int(stream(self.seed, self.step, f"{name}/{self.name}").integers(2**62))
        shape = (self.global_size, *self.condition.shape)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return (drawn if len(self) == self.global_size else drawn[self.rows]).to(self.device)

    def sigma_at(self, index: int) -> Tensor:
        """The schedule's noise level at a grid index, for each row (B,)."""
        return self.sigmas[index].to(self.device).expand(len(self))

    def clean(self) -> Tensor:
        """The rows' clean latents (B, …), from their data."""
        if self.targets is None:
            raise ValueError("the rows of this batch have no targets")
        return self.targets().to(self.device)


@dataclass(frozen=True)
class Draw:
    """Of each group of an update: its teacher, its sample, whether its prompt is dropped; `queries` (rows, K) draws."""

    teacher_index: list[int]
    sample_index: list[int]
    unconditional: list[bool]
    queries: Tensor


class Batches:
    """`draw(step)` samples an update; `of(step, draw)` yields the batches of process `rank` of `world`.

    UserError for what the teachers' data lack and the recipe alone does not show.
    """

    def __init__(
        self, recipe: Recipe, teachers: Sequence[RoutedTeacher], device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        self.teachers, self.device, self.rank, self.world = list(teachers), device, rank, world
        self.seed, self.rows, self.group, self.sampling = recipe.seed, recipe.batch, recipe.group_size, recipe.sampling
        self.shares: Sequence[float] | None = None  # of the moment (`routing.per: need`); None: the recipe's
        self.query, self.dropout = recipe.query, recipe.guidance.unconditional
        self.guided = recipe.rollout.guidance != 1
        self.one_level = recipe.one_level
        self.micro_batch = max(self.group, recipe.rows_at_once // self.group * self.group)
        for teacher in self.teachers:
            if recipe.needs_targets and not isinstance(teacher.dataset, HasTargets):
                raise UserError(
                    f"objective {recipe.objective} learns from finished pictures, and the data of teacher "
                    f"{teacher.name!r} has none; give data with a target picture for each row"
                )
            if teacher.null is None and (self.dropout or self.guided):
                key = "guidance.unconditional" if self.dropout else "rollout.guidance"
                raise UserError(f"{key} needs the null prompt, and teacher {teacher.name!r} has none; leave it out")

    def draw(self, step: int) -> Draw:
        """What update `step` samples."""
        query, lengths = self.query, [len(t.dataset) for t in self.teachers]
        teachers, samples = sample_batch(self.sampling, step, lengths, self.shares)
        dropped = stream(self.seed, step, "blank").random(len(teachers)) < self.dropout
        queries = draw_queries(self.seed, step, self.rows, query.count, query.law, query.beta, query.law_options)
        if self.one_level:
            queries = queries[:: self.group].repeat_interleave(self.group, dim=0)
        return Draw(teachers, samples, np.asarray(dropped).tolist(), queries)

    def of(self, step: int, draw: Draw, hook: QueryHook | None = None) -> Iterator[Batch]:
        """This process's batches of an update; a `hook` may give conditions of its own, and joins each batch."""
        start = 0
        for layout in self._layouts(draw):
            order = [row for g in layout for row in range(g * self.group, (g + 1) * self.group)]
            mine = [i for i in range(len(order)) if (start + i) // self.group % self.world == self.rank]
            for first in range(0, len(mine), self.micro_batch):
                rows = mine[first : first + self.micro_batch]
                groups = [order[row] // self.group for row in rows]
                schedule = self.teachers[draw.teacher_index[groups[0]]].dataset.sigmas(draw.sample_index[groups[0]])
                batch = Batch(
                    seed=self.seed,
                    step=step,
                    name=str(start),
                    global_size=len(order),
                    rows=rows,
                    teacher_index=[draw.teacher_index[g] for g in groups],
                    unconditional=[draw.unconditional[g] for g in groups],
                    condition=self._condition(groups, draw, hook),
                    null_condition=self._null(groups, draw) if self.guided else None,
                    sigmas=schedule.float().cpu(),
                    query=self.query,
                    query_draws=draw.queries[[order[row] for row in rows]],
                    device=self.device,
                    targets=partial(self._targets, groups, draw),
                )
                if hook is not None:
                    batch.hook = hook.begin_batch(batch, groups, layout)
                yield batch
            start += len(order)

    def _layouts(self, draw: Draw) -> list[list[int]]:
        """Groups that batch together; in a layout those of one teacher, with or without prompt, lie side by side."""
        found: dict[Hashable, dict[tuple[int, bool], list[int]]] = {}
        for g, (m, sample) in enumerate(zip(draw.teacher_index, draw.sample_index, strict=True)):
            data = self.teachers[m].dataset
            key = (data.layout(sample), tuple(data.sigmas(sample).tolist()))
            found.setdefault(key, {}).setdefault((m, draw.unconditional[g]), []).append(g)
        return [[g for members in parts.values() for g in members] for parts in found.values()]

    def _condition(self, groups: Sequence[int], draw: Draw, hook: QueryHook | None) -> Condition:
        """The conditions of these groups, in order; the unconditional ones with the null prompt."""
        dataset = hook.dataset if hook is not None else lambda g: self.teachers[draw.teacher_index[g]].dataset
        parts = []
        for (dropped, data), run in _runs(groups, lambda g: (draw.unconditional[g], dataset(g))):
            part = data.rows([draw.sample_index[g] for g in run]).to(self.device)
            parts.append(with_prompt_of(part, self._null(run, draw)) if dropped else part)
        return stack(parts)

    def _null(self, groups: Sequence[int], draw: Draw) -> Condition:
        """The null prompt's conditions of these groups, in order."""
        parts = []
        for m, run in _runs(groups, lambda g: draw.teacher_index[g]):
            null = self.teachers[m].null
            assert null is not None  # refused above
            rows = [0] * len(run) if len(null) == 1 else [draw.sample_index[g] for g in run]
            parts.append(null.rows(rows).to(self.device))
        return stack(parts)

    def _targets(self, groups: Sequence[int], draw: Draw) -> Tensor:
        """Clean latents of these groups, in order."""
        parts = []
        for m, run in _runs(groups, lambda g: draw.teacher_index[g]):
            data = self.teachers[m].dataset
            assert isinstance(data, HasTargets)  # refused above
            parts.append(data.targets([draw.sample_index[g] for g in run]))
        return torch.cat(parts).float()


def _runs(groups: Sequence[int], key: Callable[[int], Any]) -> Iterator[tuple[Any, list[int]]]:
    """Consecutive groups of an equal key together."""
    return ((value, list(run)) for value, run in groupby(groups, key))
