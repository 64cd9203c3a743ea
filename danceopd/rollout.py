"""Walk every row of a batch from noise down to its own query, and not one step further.

Rows stop at different depths, so they are sorted by depth and finished rows leave the batch: the cost is
exactly the sum of the depths, in rows. States are fp32 and carry no graph, but may enter one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danceopd.fields import VelocityField
from danceopd.pipelines.record import Condition


@torch.no_grad()
def rollout(
    field: VelocityField,
    noise: Tensor,
    sigmas: Tensor,
    stop: Tensor,
    condition: Condition,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """States at each row's stop: `x (B, …)` fp32, in the order of `noise`, without a gradient.

    `noise (B, …)` is the state at `sigmas[0]`; `sigmas (N+1,)` the falling schedule; `stop (B,)` long, each
    row's grid index, 0 (the noise itself) to N (the clean end). `field` is asked once a step, with only the
    rows still walking. `callback(step, rows, x)` sees, before each step, which rows (LongTensor, indices
    into `noise`) still walk and their states; it must not change them. ValueError for a stop off the grid.
    """
    if stop.shape != noise.shape[:1] or len(condition) != len(noise):
        raise ValueError(f"{len(noise)} rows of noise, {len(condition)} of conditions, stop {tuple(stop.shape)}")
    depths = sorted(stop.tolist(), reverse=True)
    if depths and (depths[-1] < 0 or depths[0] >= len(sigmas)):
        raise ValueError(f"stop must lie in 0..{len(sigmas) - 1}, not {depths[-1]}..{depths[0]}")
    x = noise.to(torch.float32, copy=True)
    ragged = bool(depths) and depths[0] != depths[-1]
    order = torch.argsort(stop.to(x.device), descending=True, stable=True) if ragged else None
    if order is not None:
        x, condition = x[order], condition.rows(order)
    grid = sigmas.to(x.device, torch.float32)
    deltas = grid[1:] - grid[:-1]
    walking = len(depths)
    for step in range(depths[0] if depths else 0):
        if depths[walking - 1] <= step:
            while depths[walking - 1] <= step:
                walking -= 1
            condition = condition.rows(slice(0, walking))
        active = x[:walking]
        if callback is not None:
            rows = torch.arange(walking, device=x.device) if order is None else order[:walking]
            callback(step, rows, active)
        velocity = field(active, grid[step].expand(walking), condition)
        active.add_(deltas[step] * velocity)
    if order is None:
        return x
    return torch.empty_like(x).index_copy_(0, order, x)
