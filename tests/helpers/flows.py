"""An exact flow for tests: Gaussian data, whose velocity is known, and conditions that are nothing but rows.

Data `x0 ~ N(mean, scale²)` in each element; then `x_σ` is Gaussian, too, and `E[ε - x0 | x_σ]` is linear in it. A
linear student's trajectory stays Gaussian, so every expected loss and gradient is a formula in means and variances.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """A condition that is only row numbers."""

    def __init__(self, count: int | Tensor, shape: tuple[int, ...] = ()) -> None:
        self.index = torch.arange(count) if isinstance(count, int) else count
        self.shape = shape

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index) -> Rows:
        return Rows(self.index[index], self.shape)


class Gaussian:
    """The velocity field of data N(mean, scale²); `line(σ)` is (a, b) of the velocity `a x + b`."""

    def __init__(self, mean: float, scale: float) -> None:
        self.mean, self.scale = mean, scale

    def moments(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of `x_σ`."""
        return (1 - sigma) * self.mean, (1 - sigma) ** 2 * self.scale**2 + sigma**2

    def line(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        at, variance = self.moments(sigma)
        slope = (sigma - (1 - sigma) * self.scale**2) / variance
        return slope, -self.mean - slope * at

    def __call__(self, x: Tensor, sigma: Tensor, condition=None) -> Tensor:
        slope, offset = self.line(sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))
        return slope * x + offset


def shifted(steps: int, shift: float) -> Tensor:
    """A flow-matching schedule (steps + 1,) with a shift, as the stock schedulers make it."""
    grid = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * grid / (1 + (shift - 1) * grid), torch.zeros(1)])
