"""What is kept of a layer's inputs while they stream by: second moments, however many inputs there are.

Each adapter has inputs of its own. Their mean Gram matrices are added up at once, so memory does not grow with the
number of adapters; of each adapter alone only what its A makes of its Gram matrix is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from danceopd.adapters.svd import Factors
from danceopd.models.lora import Adapter

if TYPE_CHECKING:
    from danceopd.adapters.blend import LayerParts
    from danceopd.adapters.blending.methods import Method

WIDE = 4096
"""Moments of wider features are summed in fp32, where fp64 would take gigabytes a layer; all others in fp64."""


class Moments:
    """Second moments of one layer's features φ (f): its inputs x, or with `latent` z = A x of all A side by side.

    `total` (f, f) is Σ_k E_k[φ φᵀ] with E_k the mean over adapter k's inputs; of each adapter that is not missing,
    `crossed` (r, f) is E_k[(A_k x) φᵀ] and `diagonals` (f,) the diagonal of E_k[φ φᵀ]. Inputs of an adapter that has
    not this layer have no latents of their own, and do not count among latents.
    """

    def __init__(self, pairs: Sequence[Factors | None], latent: bool) -> None:
        first = next(pair[0] for pair in pairs if pair is not None)
        self.latent, self.device = latent, first.device
        self.down = [None if pair is None else pair[0] for pair in pairs]
        self.joined = torch.cat([a for a in self.down if a is not None])
        width = features(self.joined.shape[0], self.joined.shape[1], latent)
        self.total = first.new_zeros(width, width, dtype=_dtype(width))
        self.crossed = [None if a is None else self.total.new_zeros(a.shape[0], width) for a in self.down]
        self.diagonals = [self.total.new_zeros(width) for _ in self.down]

    @torch.no_grad()
    def add(self, place: int, x: Tensor, share: float) -> None:
        """Inputs `x (…, in)` of the adapter at `place`, whose mean counts as this share of that adapter's mean."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.device, torch.float32)
        if not len(x) or (self.latent and self.down[place] is None):
            return
        share /= len(x)
        phi = x @ self.joined.T if self.latent else x
        gram = phi.T @ phi
        self.total.add_(gram, alpha=share)
        self.diagonals[place].add_(gram.diagonal(), alpha=share)
        a, crossed = self.down[place], self.crossed[place]
        if a is not None and crossed is not None:
            crossed.add_((x @ a.T).T @ phi, alpha=share)


class Inputs(Protocol):
    """The inputs of the layers of a blend, recorded as they are asked for."""

    def begin(self, adapters: Sequence[Adapter], parts: Mapping[str, LayerParts], how: Method) -> list[str]:
        """The layers, in the order in which they are to be solved."""
        ...

    def of(self, layer: str) -> Moments:
        """What the inputs of a layer are, its adapters in the order of its part. Asked for once a layer."""
        ...

    def solved(self, layer: str, pair: Factors) -> None:
        """Tells what a layer's blend is, before the next one is asked for."""
        ...


def features(ranks: int, into: int, latent: bool) -> int:
    """How many features a layer has: its inputs, or the ranks of its adapters together."""
    return ranks if latent else into


def moments_bytes(ranks: int, into: int, latent: bool) -> int:
    """Bytes of the moments of a layer whose adapters have so many ranks together."""
    width = features(ranks, into, latent)
    return (width * width + ranks * width) * _dtype(width).itemsize


def _dtype(width: int) -> torch.dtype:
    return torch.float64 if width <= WIDE else torch.float32
