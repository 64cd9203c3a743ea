"""Where a teacher edits and how far the student follows, from two queries of the teacher (V-Zero, arXiv 2606.25319).

`d = v+ - v-` is the teacher's velocity less its velocity under a contrast, at one state of the student. Its energy over
the tokens is where the edit is (`edit_mask`, so `token_weights`), and the student's own velocity along it is how much
of the edit the student does (`progress`). A row's weight is its standard score among its siblings, clipped
(`row_weights`), and 1 wherever the score would mean nothing. Everything compared here is frozen but the student's
velocity, without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

LEAST, MOST = 0.25, 4.0
"""Bounds of token weights, before they are brought back to a mean of 1."""
FLOOR = 1e-3
"""Energy of the difference over that of the velocity, below which the contrast changed nothing."""
SPREAD = 0.02
"""Deviation of the scores below which siblings are alike."""


def edit_mask(difference: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Where the two velocities differ, in [0, 1]: (B, n, 1) for tokens (B, n, C), (B, 1, h, w) for pictures (B, C, h,
    w).

    Energy summed over channels, averaged over 3x3 neighbours (of tokens, where `grid` says their rows and columns),
    cut at the upper fence of its quartiles (Q3 + 1.5 IQR), over its largest value. Not over its range as in
    arXiv 2308.08947, which would stretch an even map, that of a change of style, as far as a local one.
    """
    energy = difference.float().square()
    if difference.ndim > 2:
        energy = energy.sum(1 if difference.ndim == 4 else -1, keepdim=True)
    energy = _blurred(energy, grid)
    flat = energy.flatten(1)
    low, high = (torch.quantile(flat, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    flat = torch.minimum(flat, high + 1.5 * (high - low))
    largest = flat.amax(1, keepdim=True)
    return (flat / torch.where(largest > 0, largest, torch.ones_like(largest))).view_as(energy)


def token_weights(mask: Tensor, strength: float) -> Tensor:
    """`1 + strength (M / mean M - 1)`, clipped to `LEAST` … `MOST`, then mean 1 a row; shape of `mask`.

    `strength` 0, or a mask of zeros: exactly 1.
    """
    flat = mask.flatten(1)
    mean = flat.mean(1, keepdim=True)
    raised = torch.where(mean > 0, flat / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.ones_like(flat))
    weights = (1 + strength * (raised - 1)).clamp(LEAST, MOST)
    return (weights / weights.mean(1, keepdim=True)).view_as(mask)


def progress(velocity: Tensor, away: Tensor, difference: Tensor) -> Tensor:
    """How much of the teacher's edit the student does, (B,): `<v_θ - v-, d> / |d|²`; 0 none, 1 all.

    A step of the student's own is likelier under the teacher's condition than under the contrast where it is above a
    half (the log ratio of the two Gaussians is proportional to `(2 ρ - 1) |d|²`).
    """
    d = difference.float().flatten(1)
    along = ((velocity.float() - away.float()).flatten(1) * d).sum(1)
    energy = d.square().sum(1)
    return along / torch.where(energy > 0, energy, torch.ones_like(energy))


def scores(rho: Tensor) -> Tensor:
    """Progress as it is compared, within [-1, 1]: overshooting earns nothing."""
    return rho.clamp(-1, 1)


def row_weights(
    score: Tensor, mean: Tensor, deviation: Tensor, alpha: float, bounds: tuple[float, float], sound: Tensor
) -> Tensor:
    """`clip(1 + α (s - mean) / deviation, bounds)` (B,), and exactly 1 where the comparison would mean nothing.

    That is: rows that are not `sound`; siblings that are all alike (deviation below `SPREAD`); siblings that on
    average move away from the teacher (mean below 0), whose best would only be the least wrong.
    """
    weights = (1 + alpha * (score - mean) / (deviation + 1e-6)).clamp(*bounds)
    return torch.where(sound & (deviation >= SPREAD) & (mean >= 0), weights, torch.ones_like(weights))


def informative(difference: Tensor, teacher: Tensor) -> Tensor:
    """Whether the contrast changed the velocity by more than `FLOOR` of its energy, (B,) bool."""
    energy, whole = (v.float().square().flatten(1).sum(1) for v in (difference, teacher))
    return (energy > 0) & (energy >= FLOOR * whole)


def leak(velocity: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The student's squared error outside the edit, (B,): the mean of `(1 - M) (v_θ - v+)²`."""
    return ((1 - mask) * (velocity.float() - teacher.float()).square()).flatten(1).mean(1)


def of_groups(score: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each row's siblings, itself among them, (B,) each; siblings lie side by side."""
    siblings = score.unflatten(0, (-1, group))
    mean, deviation = siblings.mean(1), siblings.std(1, correction=0)
    return mean.repeat_interleave(group), deviation.repeat_interleave(group)


def _blurred(energy: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """The mean of each place and its neighbours; as it is where places have no neighbours."""
    if energy.ndim == 4:
        return avg_pool2d(energy, 3, 1, 1, count_include_pad=False)
    if energy.ndim != 3 or grid is None:
        return energy
    picture = energy.squeeze(-1).unflatten(1, grid).unsqueeze(1)
    return avg_pool2d(picture, 3, 1, 1, count_include_pad=False).flatten(1).unsqueeze(-1)
