"""Where a rollout decides, and what a teacher with a privileged context would say there (OPID, arXiv 2606.26790).

A rollout's clean estimate moves by `t_{k+1} (v_k - v_{k+1})` from one step to the next; `Criticality` turns that into
the criticality of every step, from the velocities that the rollout takes anyway. Some samples are queried at one of the
most critical steps (`chosen`), the others where the query law says. The teacher is queried once more under a context
that the student has not; the target shifts by the difference of the two answers of that one frozen field (`shift`), no
further than a share of the answer: a shift refreshed from the student would compound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from danceopd.common.rng import stream
from danceopd.common.tensors import append_dims
from danceopd.models.fields import VelocityField
from danceopd.pipelines.condition import Condition
from danceopd.recipe.labelfree import Skills


@dataclass(frozen=True)
class CriticalDraws:
    """Of each group of an update: whether it is queried at a critical step, the degradation of its source if so (an
    index of `Skills.degrade`), and the keys (groups, steps) by which critical steps are picked."""

    critical: np.ndarray
    kind: np.ndarray
    keys: np.ndarray


def draw_critical(seed: int, step: int, groups: int, steps: int, options: Skills) -> CriticalDraws:
    """A function of (seed, step, group); `steps` of a rollout."""
    numbers = stream(seed, step, "critical")
    critical = numbers.random(groups) < options.critical
    return CriticalDraws(critical, numbers.integers(len(options.degrade), size=groups), numbers.random((groups, steps)))


def candidates(steps: int, until: float) -> int:
    """How many steps may be critical, the first so many; the rollout must go one state beyond the last of them."""
    return max(2, math.ceil(until * steps)) - 1 if steps > 1 else 0


class Criticality:
    """Criticality `κ_k = t_{k+1}² |v_k - v_{k+1}|² / (t_k - t_{k+1})` of each step of B rollouts, on the way.

    `|.|²` is the mean over a row's numbers. `kappa` (B, N-1), for the N steps of `sigmas`; a row that stops early has
    zeros from there on. It is an `engine.rollout.Observer`.
    """

    def __init__(self, sigmas: Tensor, rows: int, device: torch.device) -> None:
        self.kappa = torch.zeros(rows, max(0, len(sigmas) - 2), device=device)
        self._sigmas = sigmas.tolist()
        self._last: Tensor | None = None
        self._step, self._rows = 0, torch.arange(rows, device=device)

    def before(self, step: int, rows: Tensor, x: Tensor) -> None:
        """The rollout's callback: which step comes, and for which rows."""
        self._step, self._rows = step, rows

    def around(self, field: VelocityField) -> VelocityField:
        """The field, observed."""

        def observed(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            velocity = field(x, sigma, condition)
            self._see(velocity)
            return velocity

        return observed

    def _see(self, velocity: Tensor) -> None:
        k = self._step - 1
        if self._last is None:
            self._last = velocity.new_zeros(len(self.kappa), *velocity.shape[1:])
        else:
            here, length = self._sigmas[k + 1], self._sigmas[k] - self._sigmas[k + 1]
            moved = (self._last[self._rows] - velocity).square().flatten(1).mean(1)
            self.kappa[self._rows, k] = here**2 * moved / length
        self._last[self._rows] = velocity


def chosen(kappa: Tensor, keys: Tensor, count: int, top: float, group: int = 1) -> tuple[Tensor, Tensor]:
    """`count` critical steps of each rollout, (B, count) long, and whether its criticality says anything, (B,) bool.

    The share `top` of the steps with the largest `kappa` (B, L) are critical; which of them are queried, the smallest
    `keys` (B, ≥ L) say. Siblings (`group` rows side by side, with equal keys) go by their mean, so that all are queried
    at one.
    """
    kappa = kappa.unflatten(0, (-1, group)).mean(1).repeat_interleave(group, dim=0)
    steps = kappa.shape[1]
    sound = torch.isfinite(kappa).all(1) & (kappa.sum(1) > 0)
    kept = max(1, math.ceil(top * steps))
    best = kappa.argsort(dim=1, descending=True, stable=True)[:, :kept]
    order = keys.to(kappa.device).gather(1, best).argsort(dim=1)
    picked = best.gather(1, order)
    return picked[:, torch.arange(count, device=kappa.device) % kept], sound


def shift(plain: Tensor, privileged: Tensor, eta: float, radius: float) -> Tensor:
    """`η d`, with `d = privileged - plain` brought back to a length of at most `radius |plain|`, row by row; (B, …).

    Both are answers of one frozen field at one state; `privileged` is the one that knew more.
    """
    d = privileged - plain
    length, most = (v.flatten(1).norm(dim=1) for v in (d, plain))
    scale = (radius * most / torch.where(length > 0, length, torch.ones_like(length))).clamp(max=1)
    return eta * append_dims(scale, d) * d


def shift_share(shifted: Tensor, velocity: Tensor, plain: Tensor) -> Tensor:
    """`|η d| / (|v_θ - v| + |η d|)` (B,): how much of what a row learns is the shift; 0 where there is none."""
    moved, error = (v.float().flatten(1).norm(dim=1) for v in (shifted, velocity - plain))
    whole = moved + error
    return moved / torch.where(whole > 0, whole, torch.ones_like(whole))


Guide = Callable[[Tensor, Tensor, float], Tensor]
"""How a family guides: (v, v_null, scale) -> v."""
