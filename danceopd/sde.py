"""Random walks that keep the flow's marginals: the SDE of Flow-GRPO (arXiv 2505.05470, eq. 9), as Flow-OPD uses it.

    dx = [v + s²/(2σ) (x + (1-σ) v)] dσ + s dw,   s(σ) = a sqrt(σ / (1-σ)),   σ falling from 1 to 0

`a` is the walk's noise (0.7 in those papers; 0 is Euler's step). Every row's noise is handed in, so a walk is a
function of its seed. Euler-Maruyama keeps the marginals as steps shrink, not exactly on a coarse grid: s is unbounded
at σ = 1, where, as in the released code, the next level stands in for σ inside s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from danceopd.solvers import beside


class Diffusion:
    """The solver of one random walk: noise `a` and, for each step, standard normal draws (B, …) for the whole batch.

    `second` is the schedule's second level.
    """

    def __init__(self, noise: float, second: float, draw: Callable[[int], Tensor]) -> None:
        self.noise, self.second, self.draw = noise, second, draw
        self._step = 0

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        drawn = self.draw(self._step).to(x)
        drawn = drawn[: len(x)] if rows is None else drawn[rows]
        return self.mean(x, velocity, sigma, to) + beside(self.deviation(sigma, to), x) * drawn

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        self._step += 1

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        sigma, to = sigmas[:-1], sigmas[1:]
        return self._gain(sigma, to), self.deviation(sigma, to)

    def mean(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
        """Mean (b, …) of the state at `to`, given `x` at `sigma`; linear in the velocity."""
        keep = 1 + self._rate(sigma) / (2 * sigma) * (to - sigma)
        return beside(keep, x) * x + beside(self._gain(sigma, to), x) * velocity

    def deviation(self, sigma: Tensor, to: Tensor) -> Tensor:
        """Standard deviation (b,) of each number of the state at `to`."""
        return torch.sqrt(self._rate(sigma) * (sigma - to))

    def _gain(self, sigma: Tensor, to: Tensor) -> Tensor:
        return (1 + self._rate(sigma) * (1 - sigma) / (2 * sigma)) * (to - sigma)

    def _rate(self, sigma: Tensor) -> Tensor:
        """s², with the second level in place of a σ at which it has no bound."""
        inside = torch.where(sigma >= 1, torch.full_like(sigma, self.second), sigma)
        return self.noise**2 * sigma / (1 - inside)
