"""A lesson: rows of one update that share a layout and a schedule, and all that an objective may do with them.

The student walks (`walk`), teachers are asked (`ask`), the student answers with a gradient (`velocity`), and what it
should have said becomes a gradient (`learn`). Each row is asked of its own teacher, some with the null prompt, where
the teacher's answer is the unguided one. Random numbers depend on the seed, the step, their name and the row alone,
so any slice of the rows draws what the whole would have drawn: a process learns its slice, and the sum is the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.captured import CapturedField
from danceopd.fields import AdapterField, GuidedField, MergedField, VelocityField
from danceopd.pipelines.record import Condition
from danceopd.query import place, step_weights
from danceopd.recipe import Recipe
from danceopd.reuse import with_source_kept
from danceopd.rollout import rollout
from danceopd.routing import stream
from danceopd.sde import Diffusion
from danceopd.solvers import SOLVERS, Solver

if TYPE_CHECKING:
    from danceopd.gating import Gating
    from danceopd.skills import Criticality


@dataclass(frozen=True)
class Fields:
    """Who can be asked: the student as it walks and as it learns, and each teacher, guided as the recipe says."""

    walk: AdapterField | MergedField | CapturedField
    student: VelocityField
    teachers: Sequence[VelocityField]


@dataclass(frozen=True)
class Told:
    """What one `learn` taught each row, (B,) each: at which noise level, the loss, the mean squared velocity error,
    and what the gates said of it, by name (see `gates.FIGURES`; NaN where a row has no such figure)."""

    sigma: Tensor
    loss: Tensor
    error: Tensor
    gate: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Lesson:
    """Rows `mine` of a batch of `whole` rows; all tensors of rows below are (B, …) for the B of `mine`, in order.

    `routes` are teachers' indices, `blank` the rows asked with the null prompt (already in `condition`), `null`
    the null prompt of each row when the walk is guided, `drawn` (B, K) the queries' draws, `targets` reads the
    clean latents, `gates` what its gates ask besides. `name` tells this lesson's random numbers from another's of the
    same step.
    """

    recipe: Recipe
    fields: Fields
    step: int
    name: str
    whole: int
    mine: list[int]
    routes: list[int]
    blank: list[bool]
    condition: Condition
    null: Condition | None
    sigmas: Tensor
    drawn: Tensor
    device: torch.device
    targets: Callable[[], Tensor] | None = None
    gates: Gating | None = None
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        query = self.recipe.query
        self.stops, self.levels = place(self.drawn, self.sigmas, query.law, query.jitter)
        even = torch.ones_like(self.levels)
        self.weights = even if query.weight == "even" else step_weights(self.stops, self.levels, self.sigmas)

    def noise(self, name: str = "noise") -> Tensor:
        """Standard normal latents (B, …) fp32 of this step; the same for the same name."""
        seed = int(stream(self.recipe.seed, self.step, f"{name}/{self.name}").integers(2**62))
        shape = (self.whole, *self.condition.shape)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return (drawn if len(self.mine) == self.whole else drawn[self.mine]).to(self.device)

    def level(self, index: int) -> Tensor:
        """The schedule's noise level at a grid index, for each row (B,)."""
        return self.sigmas[index].to(self.device).expand(len(self.mine))

    def solver(self) -> Solver:
        """A fresh solver of the recipe's walks."""
        knobs = self.recipe.rollout
        if knobs.noise:
            return Diffusion(knobs.noise, float(self.sigmas[1]), lambda step: self.noise(f"walk {step}"))
        return SOLVERS[knobs.solver]()

    def walk(self, stops: Tensor, levels: Tensor | None = None, watch: Criticality | None = None) -> Tensor:
        """The student's states (B, K, …) at grid indices `stops` (B, K), or at `levels` on the steps to them.

        `watch` overhears the velocities that the walk takes.
        """
        scale, solver = self.recipe.rollout.guidance, self.solver()
        walker: Callable[..., Tensor] = self.fields.walk
        condition: Any = self.condition
        if self.recipe.rollout.keep_source:
            condition = with_source_kept(self.fields.walk, condition)
        if self.null is not None:
            condition = _Both(condition, self.null)

            def guided(x: Tensor, sigma: Tensor, both: _Both) -> Tensor:
                return GuidedField(self.fields.walk, both.null, scale)(x, sigma, both.condition)

            walker = guided
        before = None
        if watch is not None:
            walker, before = watch.around(walker), watch.before
        how: Any = {"callback": before, "levels": levels, "solver": solver}
        return rollout(walker, self.noise(), self.sigmas, stops, condition, **how)

    def everywhere(self, last: int) -> Tensor:
        """Stops (B, last + 1): every grid index up to `last`."""
        return torch.arange(last + 1).expand(len(self.mine), last + 1)

    def ask(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The routed teachers' velocities at `x (B, …)`, `sigma (B,)`."""
        return self._asked(self.routes, x, sigma)

    def ask_as(
        self, rows: list[int], condition: Condition, x: Tensor, sigma: Tensor, fields: Sequence[VelocityField]
    ) -> Tensor:
        """Velocities of some `rows` of `x (B, …)`, `sigma (B,)` under a condition of their own, one row for each.

        `fields` answer, by teacher: each row is asked of its own teacher's.
        """
        answers = x.new_empty(len(rows), *x.shape[1:])
        for m in sorted({self.routes[row] for row in rows}):
            mine = [place for place, row in enumerate(rows) if self.routes[row] == m]
            at = [rows[place] for place in mine]
            answers[mine] = fields[m](x[at], sigma[at], condition.rows(mine))
        return answers

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The student's own velocity at `x (B, …)`, with a gradient."""
        return self.fields.student(x, sigma, self.condition)

    def learn(
        self,
        surrogate: Tensor,
        sigma: Tensor,
        error: Tensor,
        loss: Tensor | None = None,
        gate: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the gradient of `surrogate (B,)`, over the rows of the whole update.

        `error (B,)` is the velocity's at `sigma (B,)`; `loss (B,)` is what to report where the surrogate's value
        says nothing, `gate` what the gates said. Nothing is read back from the device here.
        """
        (surrogate.sum() / self.recipe.batch).backward()
        self.told.append(Told(sigma, (surrogate if loss is None else loss).detach(), error.detach(), gate or {}))

    def clean(self) -> Tensor:
        """The rows' clean latents (B, …), from their data."""
        if self.targets is None:
            raise ValueError("these questions have no targets")
        return self.targets().to(self.device)

    def draw_clean(self) -> Tensor:
        """Clean latents (B, …) that the routed teachers draw themselves, by Euler's steps from the rows' noise."""
        steps = len(self.sigmas) - 1
        ends = torch.full((len(self.mine),), steps)
        return rollout(lambda x, s, _: self._asked(self.routes, x, s), self.noise(), self.sigmas, ends, self.condition)

    def _asked(self, routes: Sequence[int], x: Tensor, sigma: Tensor) -> Tensor:
        answers = torch.empty_like(x)
        for m, blank in sorted(set(zip(routes, self.blank, strict=True))):
            mine = [i for i, asked in enumerate(zip(routes, self.blank, strict=True)) if asked == (m, blank)]
            teacher = unguided(self.fields.teachers[m]) if blank else self.fields.teachers[m]
            answers[mine] = teacher(x[mine], sigma[mine], self.condition.rows(mine))
        return answers


def unguided(field: VelocityField) -> VelocityField:
    """The field without classifier-free guidance."""
    while isinstance(field, GuidedField):
        field = field.field
    return field


@dataclass(frozen=True)
class _Both:
    """Conditions and null conditions whose rows leave a walk together."""

    condition: Condition
    null: Condition

    def __len__(self) -> int:
        return len(self.condition)

    def rows(self, index: slice | list[int] | Tensor) -> _Both:
        return _Both(self.condition.rows(index), self.null.rows(index))
