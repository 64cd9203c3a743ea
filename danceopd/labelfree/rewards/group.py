"""What rewards rank: the finished samples of one question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from danceopd.pipelines.condition import Condition


@dataclass(frozen=True)
class Group:
    """G finished samples of one question: clean latents (G, …) fp32, and the question's condition, one row.

    `seed` draws the noise that all samples of the group share.
    """

    clean: Tensor
    condition: Condition
    seed: int

    def noise(self, count: int) -> Tensor:
        """`count` draws of standard normal latents (count, …) fp32, on the samples' device."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn((count, *self.clean.shape[1:]), generator=generator).to(self.clean)

    def source(self) -> Tensor | None:
        """Latents of the picture that is edited, of one sample's shape; None where there is none of that size, or where
        it is one of several."""
        context, shape = self.condition.context, self.clean.shape[1:]
        if context is None or "references" in self.condition.fixed or context[0].numel() != math.prod(shape):
            return None
        tokens = context[0].to(self.clean)
        if len(shape) == 3:  # latents (C, h, w), whose tokens are (h w, C)
            return tokens.T.reshape(shape) if tokens.shape[1] == shape[0] else None
        return tokens if tokens.shape == shape else None


class Reward(Protocol):
    """Higher is better, and only the order inside a group counts."""

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """(Q, G) fp32 of Q groups of G samples each; NaN where it says nothing of a question."""
        ...
