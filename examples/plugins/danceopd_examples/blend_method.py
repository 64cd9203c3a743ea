"""A blend method: the median of the weighted changes, entry by entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from danceopd.adapters.blending.methods import Method


def _median(deltas: Sequence[Tensor], weights: Sequence[float], density: float, draws: object) -> Tensor:
    """What is added to one layer (out, in), of what each adapter adds to it."""
    ordered = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sort(dim=0).values
    return (ordered[(len(deltas) - 1) // 2] + ordered[len(deltas) // 2]) / 2


MEDIAN = Method("median", mean=False, merge=_median)
