"""Roll out the student: every row of a batch from noise down to its own queries, and not one step further.

Rows stop at different depths, so they are sorted by depth and finished rows leave the batch: the cost is exactly the
sum of the depths, in rows. A row may be queried at several depths of its trajectory, and between two grid points: the
step that would pass a query's level is then also taken in part, which costs no further forward. States are fp32 and
carry no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from danceopd.engine.batches import Batch
from danceopd.engine.solvers import SOLVERS, Euler, FlowSDE, Solver
from danceopd.models.cuda_graphs import CapturedField
from danceopd.models.fields import AdapterField, GuidedField, MergedField, VelocityField, acting
from danceopd.models.source_cache import with_cached_source
from danceopd.pipelines.condition import Condition
from danceopd.recipe.parts import Rollout


@torch.no_grad()
def rollout(
    field: VelocityField, noise: Tensor, sigmas: Tensor, stop: Tensor, condition: Condition,
    callback: Callable[[int, Tensor, Tensor], None] | None = None, *,
    levels: Tensor | None = None, solver: Solver | None = None,
) -> Tensor:  # fmt: skip
    """States at each row's queries: `x (B, …)` fp32, in the order of `noise`, without a gradient.

    `noise (B, …)` is the state at `sigmas[0]`; `sigmas (N+1,)` the falling schedule; `stop (B,)` long, each row's grid
    index, 0 (the noise itself) to N (the clean end), or `(B, K)` for K states of each trajectory: `x (B, K, …)`.
    `levels`, of the shape of `stop`, are the noise levels to land on: each no lower than its stop's and below the grid
    point before it; None are the grid's own. `field` is queried once a step, with only the rows that go on; `solver`
    (fresh for each rollout; default Euler) takes the steps.

    `callback(step, rows, x)` sees, before each step, which rows (LongTensor, indices into `noise`) go on and their
    states; it must not change them. ValueError for a stop off the grid, or a level off its step.
    """
    if stop.shape[:1] != noise.shape[:1] or stop.ndim not in (1, 2) or len(condition) != len(noise):
        raise ValueError(f"{len(noise)} rows of noise, {len(condition)} of conditions, stop {tuple(stop.shape)}")
    stops = (stop if stop.ndim == 2 else stop[:, None]).cpu()
    if len(stops) and (int(stops.min()) < 0 or int(stops.max()) >= len(sigmas)):
        raise ValueError(f"stop must lie in 0..{len(sigmas) - 1}, not {int(stops.min())}..{int(stops.max())}")
    between = _between(stops, levels, sigmas)
    depth = stops.amax(1)
    depths = sorted(depth.tolist(), reverse=True)
    x = noise.to(torch.float32, copy=True)
    ragged = bool(depths) and depths[0] != depths[-1]
    order = torch.argsort(depth, descending=True, stable=True) if ragged else None
    if order is not None:
        stops = stops[order]
        between = None if between is None else between[order]
        order = order.to(x.device)
        x, condition = x[order], condition.rows(order)
    grid = sigmas.to(x.device, torch.float32)
    solver = Euler() if solver is None else solver
    states = x.unsqueeze(1).repeat(1, stops.shape[1], *[1] * (x.ndim - 1))
    count = len(depths)  # rows that go on
    for step in range(depths[0] if depths else 0):
        if depths[count - 1] <= step:
            while depths[count - 1] <= step:
                count -= 1
            condition = condition.rows(slice(0, count))
        active = x[:count]
        rows = None if order is None else order[:count]
        if callback is not None:
            callback(step, torch.arange(count, device=x.device) if rows is None else rows, active)
        sigma, to = grid[step].expand(count), grid[step + 1].expand(count)
        velocity = field(active, sigma, condition)
        after = solver.advance(active, velocity, sigma, to, rows)
        for k in range(stops.shape[1]):
            here = torch.nonzero(stops[:count, k] == step + 1)[:, 0]
            if not len(here):
                continue
            at, landed = here.to(x.device), after
            if between is not None:  # rows that only pass by are computed, and dropped
                landed = solver.advance(active, velocity, sigma, between[:count, k].to(x), rows)
            states[at, k] = landed[at]
        solver.remember(velocity, sigma, to)
        active.copy_(after)
    if order is not None:
        states = torch.empty_like(states).index_copy_(0, order, states)
    return states if stop.ndim == 2 else states[:, 0]


def _between(stops: Tensor, levels: Tensor | None, sigmas: Tensor) -> Tensor | None:
    """The levels to land on, on the CPU; None when all of them are on the grid."""
    if levels is None:
        return None
    levels = (levels if levels.ndim == 2 else levels[:, None]).float().cpu()
    grid = sigmas.float().cpu()
    if levels.shape != stops.shape or bool(
        ((levels < grid[stops]) | (levels > grid[(stops - 1).clamp(min=0)])).any()
    ):
        raise ValueError("a level must lie on the step that ends at its stop")
    return None if torch.equal(levels, grid[stops]) else levels


class Observer(Protocol):
    """Sees the velocities of a rollout: wrap the field in `around`, hand `before` to the rollout as its callback."""

    def before(self, step: int, rows: Tensor, x: Tensor) -> None: ...

    def around(self, field: VelocityField) -> VelocityField: ...


@dataclass(frozen=True)
class StudentRollout:
    """Trajectories of the student for a batch; `options` are the recipe's."""

    field: AdapterField | MergedField | CapturedField
    options: Rollout

    def solver(self, batch: Batch) -> Solver:
        """A fresh solver for one rollout."""
        if self.options.noise:  # the names of the noise are part of the random stream: a run depends on them
            return FlowSDE(self.options.noise, float(batch.sigmas[1]), lambda step: batch.noise(f"walk {step}"))
        return SOLVERS[self.options.solver]()

    def __call__(
        self, batch: Batch, steps: Tensor, sigmas: Tensor | None = None, observer: Observer | None = None
    ) -> Tensor:
        """States (B, K, …) at grid indices `steps (B, K)`, or at levels `sigmas (B, K)` on the steps that end there."""
        field: Callable[..., Tensor] = self.field
        condition: Any = batch.condition
        if self.options.cache_source:
            condition = with_cached_source(self.field, condition)
        if batch.null_condition is not None:
            condition = _Pair(condition, batch.null_condition)

            def guided(x: Tensor, sigma: Tensor, pair: _Pair) -> Tensor:
                return GuidedField(self.field, pair.null, self.options.guidance)(x, sigma, pair.condition)

            field = guided
        before = None
        if observer is not None:
            field, before = observer.around(field), observer.before
        with acting(self.field):  # once, and not at each step
            return rollout(
                field, batch.noise(), batch.sigmas, steps, condition, before, levels=sigmas, solver=self.solver(batch)
            )


@dataclass(frozen=True)
class _Pair:
    """Conditions and null conditions whose rows leave a rollout together."""

    condition: Condition
    null: Condition

    def __len__(self) -> int:
        return len(self.condition)

    def rows(self, index: slice | list[int] | Tensor) -> _Pair:
        return _Pair(self.condition.rows(index), self.null.rows(index))
