"""At which noise levels of a rollout the teacher is queried; drawn before the rollout begins.

``paper`` is DanceOPD's law: the step index is Beta(5, 2) over the trajectory, which on a shifted schedule is a middling
noise level. The other laws are Betas over the noise level itself, so that "low noise" means the same on every
schedule. A row stops at the last grid point that is not below its drawn level, or, jittered, at that very level: the
last step is cut short there. What is drawn is a function of (seed, step, row); where it falls depends on the row's
schedule. The noise (index 0) and every state before the clean end can be queried. A law of the user's is a plug-in, a
quantile function over the noise level (docs/plugins.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danceopd.common.rng import stream
from danceopd.errors import UserError
from danceopd.plugins import check_options, load

LEVELS: dict[str, tuple[float, float]] = {
    "low-noise": (2.0, 5.0),
    "uniform": (1.0, 1.0),
    "mid": (5.0, 5.0),
    "high-noise": (5.0, 2.0),
}
"""Beta(a, b) over the noise level of the laws that are stated in it."""
PAPER = (5.0, 2.0)
"""Beta(a, b) over the share of the steps (DanceOPD, section 4: mean 0.71)."""
BUILTIN = LEVELS | {"paper": PAPER}
"""Of each law that is no plug-in."""
LOWEST = 1e-3
"""No jittered query lies below this noise level: the model never saw one there."""


def draw_queries(
    seed: int, step: int, rows: int, count: int = 1, law: str = "paper", beta: tuple[float, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """(rows, count) fp64 in [0, 1]: noise levels, or shares of the steps for ``paper``.

    ``beta`` replaces a built-in law's own parameters, ``options`` are those of a plug-in. UserError for an unknown law.
    """
    random = stream(seed, step, "query")
    if law not in BUILTIN:
        return levels_at(torch.from_numpy(random.random((rows, count))), law, options or {})
    a, b = beta or BUILTIN[law]
    return torch.from_numpy(random.beta(a, b, size=(rows, count)))


def levels_at(share: Tensor, law: str, options: Mapping[str, Any]) -> Tensor:
    """The noise levels of a law that is a plug-in, fp64, below which these shares (in [0, 1]) of its queries lie.

    UserError where it gives anything but as many numbers in [0, 1].
    """
    function = load("query law", law)
    check_options("query law", law, function, options)
    found = function(share, **options)
    if not isinstance(found, Tensor) or found.shape != share.shape or not bool(((found >= 0) & (found <= 1)).all()):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UserError(
            f"query law {law} gave {what} for shares of shape {tuple(share.shape)}; let it give as many noise levels, "
            "each in [0, 1]"
        )
    return found.double()


def place(drawn: Tensor, sigmas: Tensor, law: str = "paper", jitter: bool = False) -> tuple[Tensor, Tensor]:
    """Where draws fall on a schedule ``sigmas`` (N+1,) that ends at 0: grid indices, and noise levels fp32.

    Both have the shape of ``drawn``. Without jitter the indices are in 0 … N-1 and the levels the grid's; with it
    a level lies on the step that ends at its index, in 0 … N.
    """
    steps, grid = len(sigmas) - 1, sigmas.float().cpu()
    if law == "paper":
        index = (drawn * steps).long().clamp(max=steps - 1)
        share = (drawn * steps - index).float()
        level = torch.lerp(grid[index], grid[index + 1], share)
    else:
        # sigmas fall, so the count of points at or above the level, less one, is the last of them.
        above = grid[:-1].double().numpy()[None, :] >= drawn.reshape(-1, 1).numpy()
        index = torch.from_numpy(np.maximum(above.sum(1) - 1, 0)).reshape(drawn.shape)
        level = torch.minimum(drawn.float(), grid[index])
    if not jitter:
        return index, grid[index]
    level = level.clamp(min=min(LOWEST, float(grid[steps - 1])))
    return torch.where(level < grid[index], index + 1, index), level


def step_weights(stops: Tensor, levels: Tensor, sigmas: Tensor) -> Tensor:
    """dt² of the step that leaves each level, over its mean on the schedule: the weighting of an ODE's KL.

    That of the paper of DiffusionOPD (arXiv 2605.15055); shape of ``stops``, fp32. A jittered level takes the step
    that it lies on.
    """
    grid = sigmas.float().cpu()
    squares = grid.diff().square()
    leaving = torch.where(levels == grid[stops], stops, stops - 1).clamp(max=len(squares) - 1)
    return (squares / squares.mean())[leaving]
