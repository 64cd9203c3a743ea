"""Blending on singular vectors, and the smaller spaces in which a method may run.

All adapters of a weight live in the span of their B (outputs) and of their A (inputs). With orthonormal bases of these,
a delta (out, in) is a small matrix without loss, and no (out, in) matrix is made. Methods on singular vectors give the
same there as on the weight itself; methods that look at entries give something else, which is what the core space of
arXiv 2509.17786 is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danceopd.adapters.blending.entries import Deltas, Weights, ties
from danceopd.adapters.svd import Factors, full_factors

SPACES = ("full", "core")
"""What a user may ask for: the weight's own space, or the core space."""
ZERO = 1e-5
"""A singular value of a delta below this share of the largest counts as zero; in fp32 it is rounding."""


# The spaces


def project(pairs: Sequence[Factors | None], space: str) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """(left (out, k), right (in, l), the deltas in that space), None for a side that keeps the weight's own axes.

    "full": neither side; "outputs": the left one; "core": both, so that τ_i = left · delta_i · rightᵀ (2509.17786:
    the bases are singular vectors of all B side by side, and of all A). A missing adapter is a zero matrix. The smaller
    spaces are in fp64.
    """
    wide = torch.float32 if space == "full" else torch.float64
    pairs = [None if pair is None else (pair[0].to(wide), pair[1].to(wide)) for pair in pairs]
    held = [pair for pair in pairs if pair is not None]
    left = None if space == "full" else _basis(torch.cat([b for _, b in held], dim=1))
    right = _basis(torch.cat([a for a, _ in held]).T) if space == "core" else None

    def inside(a: Tensor, b: Tensor) -> Tensor:
        return (b if left is None else left.T @ b) @ (a if right is None else a @ right)

    zero = torch.zeros_like(inside(*held[0]))
    return left, right, [zero if pair is None else inside(*pair) for pair in pairs]


def restore(left: Tensor | None, right: Tensor | None, merged: Tensor) -> Factors:
    """A and B of left · merged · rightᵀ."""
    a, b = full_factors(merged)
    return (a if right is None else a @ right.T), (b if left is None else left @ b)


def _basis(matrix: Tensor) -> Tensor:
    """Left singular vectors (n, k) of a matrix (n, r) that spans k dimensions; one column for a matrix of zeros."""
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, : _rank(s, 1e-12)]


def _rank(s: Tensor, zero: float = ZERO) -> int:
    """How many singular values, largest first, are not zero; at least 1."""
    return max(1, int((s > zero * s[0]).sum()))


# The methods


def knots(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """KnOTS (arXiv 2410.19735): TIES in the basis that all adapters share.

    [τ_1 … τ_n] = U Σ [V_1 … V_n]ᵀ, side by side; the ΣV_iᵀ are merged by TIES and U is put back in front.
    """
    u, s, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    rank = _rank(s)
    parts = (s[:rank, None] * vh[:rank]).split(deltas[0].shape[1], dim=1)
    return u[:, :rank] @ ties(parts, weights, density, draws)


def tsv(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """TSV-M (arXiv 2412.00081): singular vectors of different adapters are made orthogonal to each other.

    τ_i = U_i Σ_i V_iᵀ; U = [U_1 … U_n] and V become the closest matrices with orthonormal columns (Procrustes), and
    the merge is U⊥ diag(w_i Σ_i) V⊥ᵀ. The paper keeps 1/n of each adapter's singular vectors, for n whole matrices have
    too many to be orthogonal; here that is done only where the ranks add up to more than the space has dimensions.
    """
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    space = min(deltas[0].shape)
    ranks = [_rank(s) if s.any() else 0 for _, s, _ in found]
    if sum(ranks) > space:
        ranks = [min(rank, max(1, space // len(ranks))) for rank in ranks]
    u = _orthonormal(torch.cat([u[:, :rank] for (u, _, _), rank in zip(found, ranks)], dim=1))
    v = _orthonormal(torch.cat([vh[:rank].T for (_, _, vh), rank in zip(found, ranks)], dim=1))
    s = torch.cat([weight * s[:rank] for (_, s, _), rank, weight in zip(found, ranks, weights)])
    return (u * s) @ v.T


def iso_c(deltas: Deltas, weights: Weights, density: float, draws: Sequence[torch.Generator]) -> Tensor:
    """Iso-C (arXiv 2502.04959): Σ w_i τ_i = U Σ Vᵀ with every singular value set to their mean.

    The mean is over those that are not zero: a sum of LoRAs has no others.
    """
    total = torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).sum(dim=0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = _rank(s)
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def _orthonormal(columns: Tensor) -> Tensor:
    """The closest matrix with orthonormal columns: P Qᵀ of P D Qᵀ."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh
