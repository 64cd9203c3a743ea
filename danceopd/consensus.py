"""Agreement of a frozen field with itself, as a bounded multiplier (self-consistency, after arXiv 2606.27376).

Agreement across wordings alone is greatest for who ignores the prompt, so it is measured against how far a wrong prompt
moves the answer (`agreement`). It only raises weights, to at most half as much again: no weight falls, none reaches
zero, and no target moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def agreement(framed: Tensor, there: Tensor, wrong: Tensor) -> Tensor:
    """`clip(1 - H_w / H_b, 0, 1)` (B,): does a field agree with itself, and depend on what it is asked?

    `framed` (N, B, …) are its answers to N framings, of which `there` (N, B) bool are given; `wrong` (B, …) is its
    answer to a wrong prompt. `H_w` is the mean square distance of the answers from their mean, `H_b` that of their
    mean from the wrong answer. 0 for a row with fewer than two framings, or which a wrong prompt does not move.
    """
    weight = there.to(framed.dtype).reshape(*there.shape, *[1] * (framed.ndim - 2))
    count = there.sum(0)
    mean = mean_answer(framed, there)
    apart = (framed - mean).square().mul(weight).flatten(2).mean(2).sum(0) / count.clamp(min=1)
    away = (mean - wrong).square().flatten(1).mean(1)
    found = (1 - apart / torch.where(away > 0, away, torch.ones_like(away))).clamp(0, 1)
    return torch.where((count > 1) & (away > 0), found, torch.zeros_like(found))


def mean_answer(framed: Tensor, there: Tensor) -> Tensor:
    """The mean (B, …) of the answers (N, B, …) that are `there` (N, B)."""
    weight = there.to(framed.dtype).reshape(*there.shape, *[1] * (framed.ndim - 2))
    return (framed * weight).sum(0) / weight.sum(0).clamp(min=1)
