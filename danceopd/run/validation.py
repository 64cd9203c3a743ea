"""The validation error of a run: the student's velocity error on held-out prompts, where the student itself goes.

From fixed noise the student rolls out (without random steps) on rows that no update samples, and at four of its states
the routed teacher, guided and in small steps as the recipe says, is queried. The four are the medians of the quarters
of what the query law draws, so their plain mean is the law's. For teacher m

    e_m(q) = mean over rows of |v_θ(x_q, σ_q, c) − u_m(x_q, σ_q, c)|²,        q = 1 … 4, |·|² a mean over numbers
    E_m = Σ_q e_m(q) / scale_m,      scale_m = max(Σ_q e_m(q) of the start, of the bare base)
    E = mean over teachers of E_m

so 0 is the teachers, and 1 is the start or the bare base, whichever is further. Neither alone would do as a scale: a
run may start next to a teacher (`student.init`), the base may be a teacher, and a ratio to almost nothing would let
that teacher alone decide; a base that ignores the instruction agrees with a teacher that only goes on from there, so a
blend that has begun to follow it can be further away. No scale is below a hundredth of the largest. No judge, no random
number of the run's own, and no weight moves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.common.cache import cache_key
from danceopd.common.rng import RandomState
from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder
from danceopd.engine.query import BUILTIN, levels_at, place
from danceopd.engine.rollout import rollout
from danceopd.engine.solvers import SOLVERS
from danceopd.models.fields import VelocityField, acting, mean_velocity
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import FAMILIES, with_prompt_of
from danceopd.recipe.parts import Rollout
from danceopd.recipe.recipe import Recipe
from danceopd.run.heldout import FIRST_SEED, by_layout, encode_rows, held_out_rows

QUARTERS = 4
"""States of a trajectory at which the teacher is queried; each stands for an equal share of the query law."""
SMALLEST = 0.01
"""The smallest scale, as a share of the largest."""
_FINE = 1 << 14  # points at which a law's density is evaluated
_log = logging.getLogger("danceopd")

Errors = dict[str, list[float]]
"""`QUARTERS` mean squared velocity errors by teacher."""


@dataclass(frozen=True)
class HeldOutBatch:
    """Rows of one layout and schedule with their noise (B, …), and the grid indices at which they are queried."""

    condition: Condition
    noise: Tensor
    sigmas: Tensor
    query_steps: Sequence[int]


@dataclass(frozen=True)
class HeldOut:
    """One teacher's held-out rows; `null` is the null prompt of a guided rollout, one row."""

    name: str
    teacher: VelocityField
    batches: Sequence[HeldOutBatch]
    null: Condition | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(len(batch.condition) for batch in self.batches)

    @property
    def sigmas(self) -> list[float]:
        """The noise level of each quarter, on average over the rows."""
        levels = sum(len(b.condition) * b.sigmas[list(b.query_steps)].double() for b in self.batches)
        return (levels / self.rows).tolist()  # type: ignore[union-attr]


class ValidationError:
    """Measures it. `held_out` are the teachers with held-out rows, `base` the bare base, `rows_key` what identifies the
    rows: errors on other rows do not compare."""

    def __init__(
        self, rollout: Rollout, held_out: Sequence[HeldOut], base: VelocityField, device: torch.device,
        chunk: int, rows_key: str = "", small_steps: int = 1,
    ) -> None:  # fmt: skip
        self.rollout, self.chunk, self.small_steps = rollout, chunk, small_steps
        self.held_out, self.base, self.device, self.rows_key = list(held_out), base, device, rows_key

    @torch.no_grad()
    def measure(self, student: VelocityField) -> Errors:
        """The errors of a field against each teacher, on its own trajectories."""
        random = RandomState.now()
        found = {held.name: (self._sum(held, student) / held.rows).tolist() for held in self.held_out}
        random.restore()
        return found

    def _sum(self, held: HeldOut, student: VelocityField) -> Tensor:
        """(QUARTERS,) over the rows, float64 on the CPU."""
        total = torch.zeros(QUARTERS, dtype=torch.float64)
        for batch in held.batches:
            for first in range(0, len(batch.condition), self.chunk):
                rows = slice(first, first + self.chunk)
                condition, noise = batch.condition.rows(rows).to(self.device), batch.noise[rows].to(self.device)
                found = self._errors(held, student, condition, noise, batch)
                total += torch.stack([found[step] for step in batch.query_steps]).cpu()
        return total

    def _errors(
        self, held: HeldOut, student: VelocityField, condition: Condition, noise: Tensor, batch: HeldOutBatch
    ) -> dict[int, Tensor]:
        """Squared velocity errors, summed over the rows, at each queried grid index."""
        velocities: list[Tensor] = []  # the student's, unguided, by step

        def rolled(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            velocity = student(x, sigma, condition)
            velocities.append(velocity)
            if held.null is None:
                return velocity
            null = student(x, sigma, with_prompt_of(condition, held.null))
            return FAMILIES[condition.family].guide(velocity, null, self.rollout.guidance, condition)

        steps = sorted(set(batch.query_steps))
        stops = torch.tensor(steps).expand(len(noise), len(steps))
        with acting(student):
            states = rollout(rolled, noise, batch.sigmas, stops, condition, solver=SOLVERS[self.rollout.solver]())
        grid, found = batch.sigmas.to(self.device, torch.float32), {}
        for k, step in enumerate(steps):
            x, sigma = states[:, k], grid[step].expand(len(noise))
            velocity = velocities[step] if step < len(velocities) else student(x, sigma, condition)
            teacher = mean_velocity(
                lambda x, sigma: held.teacher(x, sigma, condition), x, sigma, batch.sigmas, self.small_steps
            )
            found[step] = (velocity - teacher).square().flatten(1).mean(1).double().sum()
        return found


def validation_error(
    recipe: Recipe, encoder: Encoder, datasets: Mapping[str, TeacherData], teachers: Mapping[str, tuple[VelocityField,
    Condition | None]], base: VelocityField, device: torch.device,
) -> ValidationError:  # fmt: skip
    """The validation error of a run: `teachers` are its fields, each with the null prompt of a guided rollout."""
    found, prompts = [], []
    for teacher in recipe.teachers:
        rows = held_out_rows(
            teacher, recipe.data_source(teacher), datasets[teacher.name], recipe.validation.held_out_rows, recipe.seed
        )
        dataset = encode_rows(teacher.capability, encoder, rows, recipe.rollout.steps)
        batches = []
        for members in by_layout(dataset, range(len(rows))):
            pipeline, sigmas = encoder.sized(teacher.capability, dataset.size(members[0])), dataset.sigmas(members[0])
            noise = pipeline.noise([FIRST_SEED + row for row in members])
            batches.append(HeldOutBatch(dataset.rows(members), noise, sigmas, quarters(recipe, sigmas)))
        if not batches:
            _log.warning("validation has no rows for %s", teacher.name)
            continue
        field, null = teachers[teacher.name]
        found.append(HeldOut(teacher.name, field, batches, null if recipe.rollout.guidance != 1 else None))
        prompts.append([teacher.name, [row.prompt for row in rows]])
    return ValidationError(
        recipe.rollout, found, base, device, recipe.rows_at_once, cache_key(prompts), recipe.small_steps
    )


def quarters(recipe: Recipe, sigmas: Tensor) -> list[int]:
    """The grid index at the median of each quarter of the recipe's queries on a schedule (N+1,); they may repeat.

    Objectives that query at every step have an even law over the grid.
    """
    steps, query = len(sigmas) - 1, recipe.query
    share = torch.ones(steps, dtype=torch.float64)
    if recipe.objective not in ("diffusionopd", "flowopd"):
        even = (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
        if query.law in BUILTIN:
            a, b = query.beta or BUILTIN[query.law]
            drawn, weight = even, even ** (a - 1) * (1 - even) ** (b - 1)
        else:
            drawn, weight = levels_at(even, query.law, query.law_options), torch.ones_like(even)
        index, _ = place(drawn, sigmas, query.law)
        share = torch.bincount(index, weight, minlength=steps)
    middle = (torch.arange(QUARTERS, dtype=torch.float64) + 0.5) / QUARTERS
    return torch.searchsorted(share.cumsum(0) / share.sum(), middle).clamp(max=steps - 1).tolist()


def scales(*references: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What 1 is for each teacher, given the errors of the base and of the start; NaN where no teacher differs at all.
    """
    sums = {name: max(sum(one[name]) for one in references) for name in references[0]}
    least = SMALLEST * max(sums.values(), default=0.0)
    return {name: max(value, least) or math.nan for name, value in sums.items()}


def relative(errors: Mapping[str, Sequence[float]], scale: Mapping[str, float]) -> dict[str, float]:
    """E_m by teacher."""
    return {name: sum(values) / scale[name] for name, values in errors.items()}


def forwards(recipe: Recipe, sigmas: Tensor) -> float:
    """Forwards of one row that validation takes in a whole run; a guided teacher's velocity takes two."""
    steps = quarters(recipe, sigmas)
    rollout = max(steps) * (1 if recipe.rollout.guidance == 1 else 2) + 1
    asked = len(set(steps)) * recipe.small_steps
    rows = sum(rollout + asked * (1 if t.guidance is None else 2) for t in recipe.teachers)
    return recipe.validation.checks(recipe.steps) * recipe.validation.held_out_rows * rows
