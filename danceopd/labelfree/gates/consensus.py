"""Agreement of a frozen teacher with itself, as a bounded row weight (self-consistency, after arXiv 2606.27376).

Agreement over paraphrases alone is greatest for a model that ignores the prompt, so it is measured against how far a
wrong prompt moves the velocity (`agreement`). It only raises weights, to at most half as much again: no weight falls,
none reaches zero, and no target moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims


def agreement(framed: Tensor, there: Tensor, wrong: Tensor) -> Tensor:
    """`clip(1 - H_w / H_b, 0, 1)` (B,): does a field agree with itself over paraphrases, and depend on its prompt?

    `framed` (N, B, …) are its velocities under N wordings, of which `there` (N, B) bool are given; `wrong` (B, …) is
    its velocity under a wrong prompt. `H_w` is the mean square distance of the velocities from their mean, `H_b` that
    of their mean from the wrong one. 0 for a row with fewer than two wordings, or which a wrong prompt does not move.
    """
    weight = append_dims(there.to(framed.dtype), framed)
    count = there.sum(0)
    mean = mean_velocity(framed, there)
    apart = (framed - mean).square().mul(weight).flatten(2).mean(2).sum(0) / count.clamp(min=1)
    away = (mean - wrong).square().flatten(1).mean(1)
    found = (1 - apart / torch.where(away > 0, away, torch.ones_like(away))).clamp(0, 1)
    return torch.where((count > 1) & (away > 0), found, torch.zeros_like(found))


def mean_velocity(framed: Tensor, there: Tensor) -> Tensor:
    """The mean (B, …) of the velocities (N, B, …) that are `there` (N, B)."""
    weight = append_dims(there.to(framed.dtype), framed)
    return (framed * weight).sum(0) / weight.sum(0).clamp(min=1)
