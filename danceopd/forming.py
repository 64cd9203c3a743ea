"""When W + BA is cheaper than LoRA layers: a wide rank on a small model.

For each token a LoRA layer of rank r costs 3r(in + out) multiplications, forward and backward. Where W + BA is formed
with a gradient, it costs none; the gradient of the formed weight costs in·out. So forming wins from a rank of about a
sixth of the width. It takes a copy of the adapted weights for each adapter, which only small models can spare, and
fp32 weights, in which BA loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGE = 1_000_000_000
"""Parameters above which no further copy of the weights is made for speed alone."""


def small(transformer: nn.Module) -> bool:
    """Whether copies of the weights may be made for speed alone."""
    return sum(p.numel() for p in transformer.parameters()) <= LARGE


def wide(adapted: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether the ranks of the adapted weights are wide enough for forming; False for shares and half precision."""
    if any(type(weight) is not nn.Parameter or weight.dtype != torch.float32 for weight, _ in adapted):
        return False
    return sum(weight.numel() for weight, _ in adapted) < sum(3 * rank * sum(weight.shape) for weight, rank in adapted)
