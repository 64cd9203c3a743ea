"""At which noise level a rollout stops to ask its teacher; drawn before the rollout begins.

``paper`` is DanceOPD's law: the step index is Beta(5, 2) over the walk. The other laws are Betas over the noise
level itself, so that "low noise" means the same on every schedule: the rollout stops at the last grid point
that is not below the drawn level. The noise (index 0) and every state before the clean end can be asked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from danceopd.routing import stream

LEVELS: dict[str, tuple[float, float]] = {
    "low-noise": (2.0, 5.0),
    "uniform": (1.0, 1.0),
    "mid": (5.0, 5.0),
    "high-noise": (5.0, 2.0),
}
"""Beta(a, b) over the noise level of the laws that are stated in it."""
PAPER = (5.0, 2.0)
"""Beta(a, b) over the walked share of the steps (DanceOPD, section 4: mean 0.71)."""


def draw_stops(
    seed: int, step: int, rows: int, sigmas: Tensor, law: str = "paper", beta: tuple[float, float] | None = None
) -> Tensor:
    """Grid index (rows,) at which each row stops, in 0 … N-1, for a schedule ``sigmas`` (N+1,) that ends at 0.

    ``beta`` replaces the law's own parameters. KeyError for an unknown law.
    """
    steps = len(sigmas) - 1
    a, b = beta or (PAPER if law == "paper" else LEVELS[law])
    drawn = stream(seed, step, "query").beta(a, b, size=rows)
    if law == "paper":
        stops = np.minimum((drawn * steps).astype(np.int64), steps - 1)
    else:
        grid = sigmas[:-1].double().cpu().numpy()
        # sigmas fall, so the count of points at or above the level, less one, is the last of them.
        stops = np.maximum((grid[None, :] >= drawn[:, None]).sum(1) - 1, 0)
    return torch.from_numpy(stops.astype(np.int64))
