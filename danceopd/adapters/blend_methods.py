"""The methods of `blend`: functions that merge the deltas of several adapters on one weight, each with its paper.

τ_i (out, in) is what adapter i adds to a weight, w_i its weight, d the density: the share of entries that stays.
An exact method is a weighted sum of the τ_i, so it stays in factors; a dense one decides entry by entry. An
adapter without the module takes part with τ = 0. Densities are counted within one module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.adapters.svd import Factors

Deltas = Sequence[Tensor]
Weights = Sequence[float]

OUTLIERS = 0.007
"""The share of largest entries that `breadcrumbs` leaves out (its paper's γ = 99.3 %)."""


@dataclass(frozen=True)
class Method:
    """One way to blend. Exact methods have `coefficients` of a weighted sum, dense ones have `merge`."""

    name: str
    density: float | None = None  # the default density; None: the method keeps every entry
    mean: bool = True  # weights that are not given are 1/N each; False: 1 each
    random: bool = False  # whether the result depends on the seed
    adapters: int | None = None  # the number of adapters it takes; None: any
    coefficients: Callable[[Sequence[Factors | None], Weights], list[float]] | None = None
    merge: Callable[[Deltas, Weights, float, Sequence[torch.Generator]], Tensor] | None = None

    def weights(self, adapters: int) -> list[float]:
        """The default weights."""
        return [1 / adapters if self.mean else 1.0] * adapters


# Exact: coefficients of a sum


def weighted(pairs: Sequence[Factors | None], weights: Weights) -> list[float]:
    """Σ w_i τ_i: as `linear` the mean of the models, as `task-arithmetic` (arXiv 2212.04089) the sum of task vectors.

    The paper's one coefficient λ is `scale`.
    """
    return list(weights)


def slerp(pairs: Sequence[Factors | None], weights: Weights) -> list[float]:
    """Along the arc between two deltas (Shoemake, SIGGRAPH 1985), at t = w_2 / (w_1 + w_2).

    sin((1−t)Ω)/sin Ω · τ_1 + sin(tΩ)/sin Ω · τ_2 with Ω the angle between them, from the factors alone:
    ⟨B_1 A_1, B_2 A_2⟩ = Σ (B_1ᵀB_2) ∘ (A_1 A_2ᵀ). Parallel, opposite or missing deltas are interpolated linearly.
    """
    t = weights[1] / (weights[0] + weights[1])
    first, second = pairs
    if first is None or second is None:
        return [1 - t, t]
    size = math.sqrt(_inner(first, first) * _inner(second, second))
    omega = math.acos(max(-1.0, min(1.0, _inner(first, second) / size))) if size else 0.0
    if math.sin(omega) < 1e-4:
        return [1 - t, t]
    return [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]


def _inner(one: Factors, other: Factors) -> float:
    (a1, b1), (a2, b2) = one, other
    return float(((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum())


# Dense: entry by entry


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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", coefficients=weighted),
        Method("slerp", coefficients=slerp, adapters=2),
        Method("task-arithmetic", coefficients=weighted, mean=False),
        Method("ties", density=0.2, merge=ties),
        Method("dare-linear", density=0.5, random=True, merge=dare_linear),
        Method("dare-ties", density=0.5, random=True, merge=dare_ties),
        Method("magnitude-prune", density=0.2, merge=magnitude_prune),
        Method("breadcrumbs", density=0.143, mean=False, merge=breadcrumbs),
        Method("sce", density=0.1, merge=sce),
    )
}
