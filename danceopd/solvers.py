"""How a walk steps from one noise level to the next: Euler, and a second-order multistep at the same cost.

Both ask the field once a step. Euler is the stock pipelines' own step, so a student walks as it will be sampled.
The two-step Adams-Bashforth method of `v` over sigma has local error O(h^3) instead of O(h^2): a walk of fewer steps
reaches the same states. Random walks (`danceopd.sde`) are a solver too; a transition's mean is linear in the velocity
for each of them, which is all that the KL objectives need to know (`kernel`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Solver(Protocol):
    """Steps of one walk. Rows leave a walk from its end only, so a solver's memory is cut to the rows that are left.

    `x`, `velocity` (b, …) fp32; `sigma`, `to` (b,) fp32, the levels before and after the step.
    """

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        """The state at `to`; changes nothing, so a step can also be taken in part. `rows`: which of the batch
        these are, None for the first b in order."""
        ...

    def remember(self, velocity: Tensor, sigma: Tensor, to: Tensor) -> None:
        """This step was taken, by all rows that still walk."""
        ...

    def kernel(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """For each step of a schedule (N+1,): d(mean of the next state) / d(velocity), and its deviation, both (N,).

        A deviation of 0 is a deterministic step.
        """
        ...


class Euler:
    """`x' = x + (σ' - σ) v`: first order, the step of the flow-matching pipelines."""

    def advance(self, x: Tensor, velocity: Tensor, sigma: Tensor, to: Tensor, rows: Tensor | None) -> Tensor:
        return x + beside(to - sigma, x) * velocity

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
        step = beside(to - sigma, x)
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


def beside(value: Tensor, x: Tensor) -> Tensor:
    """`value` (b,) shaped to multiply rows of `x` (b, …)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


SOLVERS: dict[str, type[Euler] | type[AdamsBashforth]] = {"euler": Euler, "ab2": AdamsBashforth}
