"""Low-rank factors: a dense weight change or a product B·A goes in, the closest B·A of a rank comes out.

Singular values are shared evenly between A and B. All norms are Frobenius norms. Kronecker and Hadamard products of
factors are factors again, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""A (r, in), B (out, r)."""
EXACT_SIDE = 512
"""A matrix whose shorter side is no longer than this, or than 2 · (rank + OVERSAMPLING), gets the exact SVD."""
OVERSAMPLING, POWER_ITERATIONS = 16, 3
"""Columns beyond the rank, and power iterations, of the randomised SVD."""


def full_factors(matrix: Tensor) -> Factors:
    """A, B with B·A = `matrix (out, in)` exactly: one is the identity of the shorter side."""
    out, into = matrix.shape
    side = torch.eye(min(out, into), dtype=matrix.dtype, device=matrix.device)
    return (matrix, side) if out <= into else (side, matrix)


def kronecker_factors(first: Factors, second: Factors) -> Factors:
    """A, B with B·A = (B1·A1) ⊗ (B2·A2): ranks multiply. LoKr (arXiv 2309.14859)."""
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def hadamard_factors(first: Factors, second: Factors) -> Factors:
    """A, B with B·A = (B1·A1) ∘ (B2·A2): ranks multiply, up to the shorter side. LoHa (arXiv 2108.06098)."""
    (a1, b1), (a2, b2) = first, second
    if a1.shape[0] * a2.shape[0] >= min(a1.shape[1], b1.shape[0]):
        return full_factors((b1 @ a1) * (b2 @ a2))
    return (a1[:, None] * a2).flatten(0, 1), (b1[:, :, None] * b2[:, None]).flatten(1)


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, vh) of `matrix (out, in)` with at least `rank` singular triplets, largest first.

    Exact for small matrices and wide ranks; else randomised with power iterations (Halko, Martinsson and Tropp, arXiv
    0909.4061), which costs a few products with the matrix. `generator` is on the CPU.
    """
    width = rank + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT_SIDE, 2 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    sample = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(POWER_ITERATIONS):
        sample = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(sample)[0])[0]
    span = torch.linalg.qr(sample)[0]
    u, s, vh = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return span @ u, s, vh


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Factors, float, float]:
    """(the pair of at most `rank` whose product is closest to B·A, ‖lost‖², ‖B·A‖²).

    A (r, in), B (out, r); the pair itself when its rank is small enough. Computed in fp64 on r-sized matrices, so the
    (out, in) product is never made.
    """
    left, right, core = product_core(a, b)
    if a.shape[0] <= rank:
        return (a, b), 0.0, float(core.square().sum())
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    new_a = (root[:, None] * vh[:rank]) @ right.T
    new_b = left @ (u[:, :rank] * root)
    pair = new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()
    return pair, float(s[rank:].square().sum()), float(s.square().sum())


def product_core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, core) in fp64 with B·A = left @ core @ right.T and orthonormal left and right."""
    left, rb = torch.linalg.qr(b.double())
    right, ra = torch.linalg.qr(a.double().T)
    return left, right, rb @ ra.T


def truncate_matrix(delta: Tensor, rank: int, generator: torch.Generator) -> tuple[Factors, float, float]:
    """(A (rank, in), B (out, rank) closest to delta (out, in), ‖lost‖², ‖delta‖²), for blends."""
    u, s, vh = truncated_svd(delta, rank, generator)
    a, b = _factors(u, s, vh, rank)
    return (a, b), float((delta - b @ a).double().square().sum()), float(delta.double().square().sum())


def low_rank_factors(delta: Tensor, rank: int, energy: float | None = None, seed: int = 0) -> Factors:
    """A (r, in), B (out, r) with B·A close to the best approximation of `delta (out, in)`, r ≤ `rank`, for extractions.

    With `energy`, r is the smallest rank that keeps this share of ‖delta‖².
    """
    u, s, vh = truncated_svd(delta, rank, torch.Generator().manual_seed(seed))
    keep = min(rank, len(s))
    if energy is not None:
        wanted = energy * float(delta.double().square().sum())
        reached = s.double().square().cumsum(0) >= wanted
        keep = min(keep, int(reached.int().argmax()) + 1 if bool(reached.any()) else keep)
    return _factors(u, s, vh, keep)


def _factors(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Factors:
    """The first `rank` singular values and vectors as A and B."""
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
