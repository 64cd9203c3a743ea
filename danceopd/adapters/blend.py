"""`blend`: several LoRAs of one base and a weight each go in, one LoRA comes out, merged in weight space.

Used as a warm start and as the baseline that a merge is compared with. A method (`blend_methods.py`) works on what the
adapters add to each weight, module by module, so their ranks may differ. Exact methods concatenate ranks and never make
the (out, in) delta; dense ones make it for one module at a time. The result is reduced to its rank by SVD, and what
that loses is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from danceopd.adapters.blend_methods import METHODS, Method
from danceopd.adapters.svd import Factors, product_core, truncate_matrix, truncate_product
from danceopd.common.messages import did_you_mean, few
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

LARGEST = 1e6
"""Largest size of a weight or scale; beyond it, a blend may overflow fp32."""


@dataclass(frozen=True)
class BlendResult:
    """A blend and its residual ‖Δ − BA‖ / ‖Δ‖ (Frobenius): what the rank lost, by module and over all together."""

    adapter: Adapter
    residuals: dict[str, float]
    residual: float


def blend(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    method: str = "linear",
    **options: Any,
) -> Adapter:
    """The adapter of `blend_with_residual`, which takes the same arguments."""
    return blend_with_residual(adapters, weights, rank, method, **options).adapter


def blend_with_residual(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    method: str = "linear",
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> BlendResult:
    """Merge adapters of one base into one, times `scale`.

    `weights` None are the method's own: 1/N each, or 1 each where it sums task vectors. They may be negative; an
    adapter of weight 0 takes no part. `density` is the share of entries kept, for the methods that drop some; `seed` is
    for the random ones. Without `rank` each module gets the sum of its adapters' ranks: exact for linear, slerp and
    task-arithmetic, close to the best of that rank for the others. With `rank`, every module of a larger one gets its
    closest approximation. fp32, on the device of the adapters.

    UserError when weights, density or method do not fit, or the adapters are not of one base.
    """
    how = check_blend(adapters, weights, rank, method, density, scale)
    given = [float(weight) for weight in (how.weights(len(adapters)) if weights is None else weights)]
    density = how.density if density is None else density
    active = [i for i, weight in enumerate(given) if weight or how.adapters]
    merged, lost, whole = {}, {}, {}
    for name in sorted({name for i in active for name in adapters[i].tensors}):
        pairs = [adapters[i].tensors.get(name) for i in active]
        held = [pair for pair in pairs if pair is not None]
        sizes = {(a.shape[1], b.shape[0]) for a, b in held}
        if len(sizes) > 1:
            raise UserError(
                f"the adapters were made for different bases: {name} maps {few(f'{i} to {o}' for i, o in sizes)}; "
                "blend adapters of one base"
            )
        taken = [given[i] for i in active]
        if how.coefficients is not None:
            shares = [scale * c for c in how.coefficients(pairs, taken)]
            parts = [(pair, share) for pair, share in zip(pairs, shares) if pair is not None and share]
            if parts:
                a, b = _joined(parts)
                merged[name], lost[name], whole[name] = truncate_product(a, b, rank or a.shape[0])
            continue
        assert how.merge is not None and density is not None
        shape = held[0][1].shape[0], held[0][0].shape[1]
        deltas = [held[0][0].new_zeros(shape) if pair is None else pair[1] @ pair[0] for pair in pairs]
        draws = [_generator(seed, name, i) for i in active]
        delta = scale * how.merge(deltas, taken, density, draws)
        width = min(rank or sum(a.shape[0] for a, _ in held), *delta.shape)
        merged[name], lost[name], whole[name] = truncate_matrix(delta, width, _generator(seed, name, -1))
    total = sum(whole.values())
    return BlendResult(
        Adapter(merged),
        {name: _share(lost[name], whole[name]) for name in merged},
        _share(sum(lost.values()), total),
    )


def check_blend(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    rank: int | None,
    method: str,
    density: float | None = None,
    scale: float = 1.0,
) -> Method:
    """The method; UserError when an argument does not fit it."""
    if method not in METHODS:
        raise UserError(f"there is no blend method {method!r}{did_you_mean(method, METHODS)}")
    how = METHODS[method]
    if not adapters or (weights is not None and len(adapters) != len(weights)):
        raise UserError(
            f"{len(adapters)} adapters and {len(weights or ())} weights cannot be blended; give each its own weight"
        )
    if weights is not None and (not all(abs(weight) <= LARGEST for weight in weights) or not any(weights)):
        raise UserError(
            f"blend weights {list(weights)} are all 0, or one is beyond ±{LARGEST:g} or no number; give weights about 1"
        )
    if rank is not None and rank < 1:
        raise UserError(f"an adapter of rank {rank} cannot be blended into; give a rank of 1 or more")
    if how.adapters is not None and len(adapters) != how.adapters:
        raise UserError(f"{method} blends {how.adapters} adapters and here are {len(adapters)}; choose another method")
    if how.adapters is not None and weights is not None and (min(weights) < 0 or not sum(weights)):
        raise UserError(f"{method} goes from one adapter to the other; give two weights of 0 or more, not {weights}")
    if not 0 < abs(scale) <= LARGEST:
        raise UserError(f"the scale is {scale:g}; give a number other than 0, up to {LARGEST:g} in size")
    if density is not None and how.density is None:
        raise UserError(f"{method} keeps every entry, so it takes no density; leave the density out")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density {density:g} is no share of the entries; give a number above 0 and up to 1")
    return how


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The adapter at another strength: `scale` folded into B. The adapter itself at 1."""
    return adapter if scale == 1 else Adapter({name: (a, b * scale) for name, (a, b) in adapter.tensors.items()})


def _joined(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Σ c·B·A exactly, by concatenating ranks: A (Σr, in), B (out, Σr)."""
    return torch.cat([a for (a, _), _ in parts]), torch.cat([b * c for (_, b), c in parts], dim=1)


def _generator(seed: int, module: str, index: int) -> torch.Generator:
    """A generator for each module and adapter, so that the order of neither counts."""
    digest = hashlib.sha256(f"{seed}/{module}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _share(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


def delta_norm(adapter: Adapter) -> float:
    """‖Δ‖ over all modules together, Frobenius."""
    squares = [float(product_core(a, b)[2].square().sum()) for a, b in adapter.tensors.values()]
    return sum(squares) ** 0.5
