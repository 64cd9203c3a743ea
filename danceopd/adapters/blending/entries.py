"""Blending entry by entry: the deltas of several adapters on one weight go in, the merged delta comes out.

τ_i is what adapter i adds to a weight, w_i its weight, d the density: the share of entries that stays. An adapter
without the module takes part with τ = 0. Densities are counted within one matrix. In another space than the weight's
own (`subspace.py`) the entries are those of the matrices there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Deltas = Sequence[Tensor]
Weights = Sequence[float]

OUTLIERS = 0.007
"""The share of largest entries that `breadcrumbs` leaves out (its paper's γ = 99.3 %)."""


def ties(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """TIES (arXiv 2306.01708): trim each τ_i, elect a sign for each entry, and average the entries that agree with it.

    Trimming keeps the share d of largest entries. The mean is weighted, so weights count relative to each other.
    """
    return _agreeing([trim(delta, density) for delta in deltas], weights)


def dare_ties(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """TIES with DARE's dropping in place of trimming (arXiv 2311.03099, section 3.3)."""
    return _agreeing([drop(delta, density, draw) for delta, draw in zip(deltas, draws, strict=True)], weights)


def dare_linear(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """DARE (arXiv 2311.03099): Σ w_i δ_i, where δ_i keeps each entry of τ_i with probability d, times 1/d."""
    return _total([drop(delta, density, draw) for delta, draw in zip(deltas, draws, strict=True)], weights)


def magnitude_prune(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """Σ w_i δ_i, where δ_i is τ_i trimmed to its d largest entries (the trim of TIES without the election)."""
    return _total([trim(delta, density) for delta in deltas], weights)


def breadcrumbs(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """Model Breadcrumbs (arXiv 2312.06795): Σ w_i m_i τ_i, where m_i keeps the share d of entries after the outliers.

    It masks the largest entries of a layer (outliers) and the smallest (noise). The paper's λ is `scale`.
    """
    return _total([trim(delta, density, skip=OUTLIERS) for delta in deltas], weights)


def sce(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """SCE (arXiv 2408.07990): select the share d of entries with the most variance, calculate coefficients, erase.

    Coefficients are η_i = w_i Σ τ_i² / Σ_j w_j Σ τ_j² over the selected entries; entries against the sign of the sum
    are erased. The paper has no w: equal weights are the paper. A negative weight flips the sign of its delta.
    """
    signed = [math.copysign(1.0, weight) * delta for delta, weight in zip(deltas, weights, strict=True)]
    stack = torch.stack(signed)
    chosen = _largest(stack.var(dim=0, correction=0), density)
    stack = stack * chosen
    energy = stack.square().sum(dim=(1, 2)) * stack.new_tensor([abs(weight) for weight in weights])
    share = energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    stack = stack * (stack.sign() == stack.sum(dim=0).sign())
    return (share[:, None, None] * stack).sum(dim=0)


# Shared steps


def trim(delta: Tensor, density: float, skip: float = 0.0) -> Tensor:
    """The entries of largest magnitude, a share `density` of all, after the share `skip` of the very largest."""
    size = delta.abs()
    kept = _largest(size, min(1.0, skip + density))
    outliers = int(skip * delta.numel())
    if outliers:
        kept &= size < _threshold(size, outliers)
    return delta * kept


def drop(delta: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Each entry with probability `density`, times 1/density; else zero. The expectation is `delta`."""
    kept = torch.rand(delta.shape, generator=draw) < density
    return delta * kept.to(delta.device) / density


def _largest(size: Tensor, share: float) -> Tensor:
    """True where an entry is among the share of largest ones; equal entries are kept or dropped together."""
    return size >= _threshold(size, max(1, int(share * size.numel())))


def _threshold(size: Tensor, count: int) -> Tensor:
    return size.flatten().kthvalue(size.numel() - count + 1).values


def _total(deltas: Deltas, weights: Weights) -> Tensor:
    return torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).sum(dim=0)


def _agreeing(deltas: Deltas, weights: Weights) -> Tensor:
    """Σ w τ / Σ |w| over the entries with the sign of Σ w τ; 0 where the sum is 0."""
    stack = torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)])
    elected = stack.sum(dim=0).sign()
    agree = (stack.sign() == elected) & (elected != 0)
    amount = stack.new_tensor([abs(weight) for weight in weights])[:, None, None] * agree
    return (stack * agree).sum(dim=0) / amount.sum(dim=0).clamp_min(torch.finfo(stack.dtype).tiny)
