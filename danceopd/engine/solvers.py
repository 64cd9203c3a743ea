"""How a rollout steps from one noise level to the next: Euler, a second-order multistep, and a stochastic one.

Each queries the field once a step. Euler is the stock pipelines' own step, so a student rolls out as it will be
sampled. The two-step Adams-Bashforth method of `v` over sigma has local error O(h^3) instead of O(h^2): fewer steps
reach the same states. `FlowSDE` keeps the flow's marginals: the SDE of Flow-GRPO (arXiv 2505.05470, eq. 9), as Flow-OPD
uses it,

    dx = [v + s²/(2σ) (x + (1-σ) v)] dσ + s dw,   s(σ) = a sqrt(σ / (1-σ)),   σ falling from 1 to 0

with `a` 0.7 in those papers; 0 is Euler's step. Euler-Maruyama keeps the marginals as steps shrink, not exactly on a
coarse grid: s is unbounded at σ = 1, where, as in the released code, the next level stands in for σ inside s. A
transition's mean is linear in the velocity for each solver, which is all that the KL objectives need (`kernel`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims


class Solver(Protocol):
    """Steps of one rollout. Rows leave it from the batch's end only, so a solver's memory is cut to the rows that are
    left.

    `x`, `velocity` (b, …) fp32; `sigma`, `to` (b,) fp32, the levels before and after the step.
    """

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        """The state at `to`; changes nothing, so a step can also be taken in part. `rows`: which of the batch
        these are, None for the first b in order."""
        ...

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        """This step was taken, by all rows that go on."""
        ...

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """For each step of a schedule (N+1,): d(mean of the next state) / d(velocity), and its deviation, both (N,).

        A deviation of 0 is a deterministic step.
        """
        ...


class Euler:
    """`x' = x + (σ' - σ) v`: first order, the step of the flow-matching pipelines."""

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        return x + append_dims(to - sigma, x) * velocity

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        return None

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        steps = sigmas.diff()
        return steps, torch.zeros_like(steps)


class AdamsBashforth:
    """`x' = x + h (v + r/2 (v - v₋))` with `h = σ' - σ`, `r = h / h₋`: second order; the first step is Euler's."""

    def __init__(self) -> None:
        self._velocity: Tensor | None = None
        self._step: Tensor | None = None

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        step = append_dims(to - sigma, x)
        if self._velocity is None or self._step is None:
            return x + step * velocity
        half = step / (2 * self._step[: len(x)].reshape(step.shape))
        return x + step * (velocity + half * (velocity - self._velocity[: len(x)]))

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        self._velocity, self._step = velocity, to - sigma

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        steps = sigmas.diff()
        factor = torch.ones_like(steps)
        factor[1:] += steps[1:] / (2 * steps[:-1])
        return steps * factor, torch.zeros_like(steps)


SOLVERS: dict[str, type[Euler] | type[AdamsBashforth]] = {"euler": Euler, "ab2": AdamsBashforth}


class FlowSDE:
    """The solver of one stochastic rollout: noise `a` and, for each step, standard normal draws (B, …) for the whole
    batch.

    `second` is the schedule's second level.
    """

    def __init__(self, noise: float, second: float, draw: Callable[[int], Tensor]) -> None:
        self.noise, self.second, self.draw = noise, second, draw
        self._step = 0

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        drawn = self.draw(self._step).to(x)
        drawn = drawn[: len(x)] if rows is None else drawn[rows]
        return self.mean(x, velocity, sigma, to) + append_dims(self.deviation(sigma, to), x) * drawn

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        self._step += 1

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        sigma, to = sigmas[:-1], sigmas[1:]
        return self._gain(sigma, to), self.deviation(sigma, to)

    def mean(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
        """Mean (b, …) of the state at `to`, given `x` at `sigma`; linear in the velocity."""
        keep = 1 + self._rate(sigma) / (2 * sigma) * (to - sigma)
        return append_dims(keep, x) * x + append_dims(self._gain(sigma, to), x) * velocity

    def deviation(self, sigma: Tensor, to: Tensor) -> Tensor:
        """Standard deviation (b,) of each number of the state at `to`."""
        return torch.sqrt(self._rate(sigma) * (sigma - to))

    def _gain(self, sigma: Tensor, to: Tensor) -> Tensor:
        return (1 + self._rate(sigma) * (1 - sigma) / (2 * sigma)) * (to - sigma)

    def _rate(self, sigma: Tensor) -> Tensor:
        """s², with the second level in place of a σ at which it has no bound."""
        inside = torch.where(sigma >= 1, torch.full_like(sigma, self.second), sigma)
        return self.noise**2 * sigma / (1 - inside)
