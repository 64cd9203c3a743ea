"""Merging adapters in weight space: the baseline every merge is measured against, and a warm start.

A method turns one module's weighted factors into one pair of factors. `linear` concatenates ranks, which is
the sum Σ w·B·A exactly and lets ranks differ. Going back to a smaller rank is the best possible one (SVD),
computed in the small core between two QR decompositions, so the full (out, in) delta is never formed.
"""

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from danceopd.errors import UserError
from danceopd.lora import Adapter
from danceopd.lora_file import few

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Method = Callable[[Sequence[Factors], Sequence[float]], Factors]


def blend(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None, method: str = "linear"
) -> Adapter:
    """Merge adapters of one base into one: per module Σ w·B·A over the adapters that have it.

    Without `rank` the sum is exact and ranks add up (an adapter of weight 0 takes none). With it, every module
    whose summed rank is larger gets its closest approximation of that rank in the Frobenius norm; `residual`
    says what that lost. Weights may be negative. fp32 on the CPU or wherever the adapters are.

    Raises UserError when weights do not fit the adapters, the adapters do not fit one base, or rank < 1.
    """
    if method not in METHODS:
        raise UserError(f"there is no blend method {method!r}; choose one of {', '.join(METHODS)}")
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights cannot be blended; give each its own")
    if not all(isfinite(weight) for weight in weights) or not any(weights):
        raise UserError(f"blend weights {list(weights)} are not finite or all zero; give numbers, one of them not 0")
    if rank is not None and rank < 1:
        raise UserError(f"an adapter of rank {rank} cannot be blended into; give a rank of 1 or more")
    merged = {}
    for name in sorted({name for adapter in adapters for name in adapter.tensors}):
        parts = [
            (adapter.tensors[name], float(weight))
            for adapter, weight in zip(adapters, weights)
            if weight and name in adapter.tensors
        ]
        sizes = {(a.shape[1], b.shape[0]) for (a, b), _ in parts}
        if len(sizes) > 1:
            raise UserError(
                f"the adapters were made for different bases: {name} maps {few(f'{i} to {o}' for i, o in sizes)}; "
                "blend adapters of one base"
            )
        if parts:
            factors = METHODS[method]([pair for pair, _ in parts], [weight for _, weight in parts])
            merged[name] = factors if rank is None else truncate(*factors, rank)
    return Adapter(merged)


def linear(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w·B·A exactly, by concatenating ranks: A (Σr, in), B (out, Σr)."""
    return torch.cat([a for a, _ in pairs]), torch.cat([b * w for (_, b), w in zip(pairs, weights)], dim=1)


METHODS: dict[str, Method] = {"linear": linear}


def truncate(a: Tensor, b: Tensor, rank: int) -> Factors:
    """The pair of at most `rank` whose product is closest to B·A; the pair itself when it is small enough.

    A (r, in), B (out, r). Computed in fp64 on r-sized matrices; the singular values are shared evenly.
    """
    if a.shape[0] <= rank:
        return a, b
    left, right, core = _core(a, b)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    new_a = (root[:, None] * vh[:rank]) @ right.T
    new_b = left @ (u[:, :rank] * root)
    return new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()


def _core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B·A = left @ core @ right.T with orthonormal left and right, fp64."""
    left, rb = torch.linalg.qr(b.double())
    right, ra = torch.linalg.qr(a.double().T)
    return left, right, rb @ ra.T


def residual(whole: Adapter, part: Adapter) -> float:
    """‖Δ_whole − Δ_part‖ / ‖Δ_whole‖ over all modules together, Frobenius: 0 exact, 1 nothing kept.

    Raises ValueError when `whole` changes nothing.
    """
    gap = _norm(blend([whole, part], [1.0, -1.0]))
    size = _norm(whole)
    if size == 0:
        raise ValueError("the adapter changes nothing, so nothing can be lost")
    return gap / size


def _norm(adapter: Adapter) -> float:
    squares = [float(_core(a, b)[2].square().sum()) for a, b in adapter.tensors.values()]
    return sum(squares) ** 0.5
