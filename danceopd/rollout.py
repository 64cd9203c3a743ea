"""Walk every row of a batch from noise down to its own queries, and not one step further.

Rows stop at different depths, so they are sorted by depth and finished rows leave the batch: the cost is
exactly the sum of the depths, in rows. A row may be seen at several depths of its one walk, and between two grid
points: the step that would pass a query's level is then also taken in part, which asks the field no more often.
States are fp32 and carry no graph, but may enter one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danceopd.fields import VelocityField
from danceopd.pipelines.record import Condition
from danceopd.solvers import Euler, Solver
from danceopd.steady import walk


@torch.no_grad()
def rollout(
    field: VelocityField,
    noise: Tensor,
    sigmas: Tensor,
    stop: Tensor,
    condition: Condition,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    *,
    levels: Tensor | None = None,
    solver: Solver | None = None,
) -> Tensor:
    """States at each row's stops: `x (B, …)` fp32, in the order of `noise`, without a gradient.

    `noise (B, …)` is the state at `sigmas[0]`; `sigmas (N+1,)` the falling schedule; `stop (B,)` long, each
    row's grid index, 0 (the noise itself) to N (the clean end), or `(B, K)` for K states of each walk:
    `x (B, K, …)`. `levels`, of the shape of `stop`, are the noise levels to land on: each no lower than its
    stop's and below the grid point before it; None are the grid's own. `field` is asked once a step, with only
    the rows still walking; `solver` (fresh for each walk; default Euler) takes the steps.

    `callback(step, rows, x)` sees, before each step from the start, which rows (LongTensor, indices into `noise`)
    still walk and their states; it must not change them. ValueError for a stop off the grid, or a level off its step.
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
    known = sigmas.tolist()
    solver = Euler() if solver is None else solver
    seen = x.unsqueeze(1).repeat(1, stops.shape[1], *[1] * (x.ndim - 1))
    walking = len(depths)
    with walk() as way:
        for step in range(depths[0] if depths else 0):
            if depths[walking - 1] <= step:
                while depths[walking - 1] <= step:
                    walking -= 1
                condition = condition.rows(slice(0, walking))
            active = x[:walking]
            rows = None if order is None else order[:walking]
            if callback is not None:
                callback(step, torch.arange(walking, device=x.device) if rows is None else rows, active)
            sigma, to = grid[step].expand(walking), grid[step + 1].expand(walking)
            way.level = known[step], sigma
            velocity = field(active, sigma, condition)
            after = solver.advance(active, velocity, sigma, to, rows)
            for k in range(stops.shape[1]):
                here = torch.nonzero(stops[:walking, k] == step + 1)[:, 0]
                if not len(here):
                    continue
                at, landed = here.to(x.device), after
                if between is not None:  # rows that only pass by are moved for nothing, and dropped
                    landed = solver.advance(active, velocity, sigma, between[:walking, k].to(x), rows)
                seen[at, k] = landed[at]
            solver.remember(velocity, sigma, to)
            active.copy_(after)
    if order is not None:
        seen = torch.empty_like(seen).index_copy_(0, order, seen)
    return seen if stop.ndim == 2 else seen[:, 0]


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
