"""Agreement of a frozen field with itself, as a bounded multiplier (self-consistency, after arXiv 2606.27376).

Agreement across wordings alone is greatest for who ignores the prompt, so it is measured against how far a wrong prompt
moves the answer (`agreement`). Agreement across noises would reward drawing one picture, so pictures are compared only
as edits of one source, inside the edit, and only those that did edit and did keep the rest are ranked (`ranks`). All of
it only raises weights, to at most half as much again: no weight falls, none reaches zero, and no target moves.
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


def preservation(change: Tensor, mask: Tensor) -> Tensor:
    """`exp(-D)` (B,): 1 for a picture that kept all outside the edit; D is the mean square change there.

    `change` (B, …) is the picture less its source, latents of a deviation of about 1.
    """
    outside = (1 - mask).expand_as(change).flatten(1)
    moved = (outside * change.square().flatten(1)).sum(1)
    return torch.exp(-moved / outside.sum(1).clamp(min=1e-6))


def likeness(change: Tensor, mask: Tensor, group: int) -> Tensor:
    """How far each picture's change inside the edit is that of its siblings, (B,): mean cosine with the others."""
    inside = (mask.sqrt() * change).flatten(1)
    inside = inside / inside.norm(dim=1, keepdim=True).clamp(min=1e-12)
    siblings = inside.unflatten(0, (-1, group))
    cosines = siblings @ siblings.transpose(1, 2)
    return ((cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)) / max(1, group - 1)).flatten()


def ranks(agree: Tensor, edited: Tensor, kept: Tensor, least: tuple[float, float], group: int) -> Tensor:
    """Ranks (B,) in [0, 1] by agreement among the siblings that pass both thresholds; 0 for those that do not.

    A picture passes when `edited` and `kept` (B,) each reach their `least`: neither makes up for the other. The best
    of n that pass has 1, the others the share of them that agree no more than it does. Groups of which all or none
    pass say nothing and have 0.
    """
    passed = ((edited >= least[0]) & (kept >= least[1])).unflatten(0, (-1, group))
    score = agree.unflatten(0, (-1, group))
    count = passed.sum(1, keepdim=True)
    below = (score.unsqueeze(1) <= score.unsqueeze(2)) & passed.unsqueeze(1)  # [g, i, j]: j agrees no more than i
    rank = torch.where(passed, below.sum(2) / count.clamp(min=1), torch.zeros_like(score))
    return torch.where((count > 0) & (count < group), rank, torch.zeros_like(rank)).flatten()


def mean_mask(mask: Tensor, group: int) -> Tensor:
    """Each row's mask replaced by the mean over its siblings: pictures are compared in one place."""
    siblings = mask.unflatten(0, (-1, group)).mean(1, keepdim=True)
    return siblings.expand(-1, group, *siblings.shape[2:]).flatten(0, 1)


def strengths(framings: int, jitter: float) -> list[float]:
    """The strengths of a teacher besides its own: `1 - jitter`, `1 + jitter`, then pairs nearer and nearer to 1."""
    pairs = -(-(framings - 1) // 2)
    steps = (jitter * (pairs - pair) / pairs for pair in range(pairs))
    return [factor for step in steps for factor in (1 - step, 1 + step)][: framings - 1]
