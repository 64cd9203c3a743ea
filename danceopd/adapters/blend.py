"""`blend`: several LoRAs of one base and a weight each go in, one LoRA comes out, merged in weight space.

Used as a warm start and as the baseline that a merge is compared with. A method (`blending/methods.py`) works on what
the adapters add to each weight, module by module, so their ranks may differ. Exact methods concatenate ranks and never
make the (out, in) delta, nor do regressions; methods on singular vectors work in a smaller space; the others make it
for one module at a time. The result is reduced to its rank by SVD, and what that loses is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from danceopd.adapters.blending.layers import LayerRule, check_rules, weights_of
from danceopd.adapters.blending.methods import Method, inner, method_of
from danceopd.adapters.blending.subspace import SPACES, project, restore
from danceopd.adapters.regression.moments import Inputs
from danceopd.adapters.svd import Factors, product_core, truncate_matrix, truncate_product
from danceopd.common.messages import did_you_mean, few
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

LARGEST = 1e6
"""Largest size of a weight or scale; beyond it, a blend may overflow fp32."""
NEEDS_INPUTS = (
    "looks at the inputs of layers, and none are recorded here; write it with `danceopd blend --method`, and name that "
    "LoRA here"
)
"""What is wrong where such a method is asked for without a model that runs."""


@dataclass(frozen=True)
class BlendResult:
    """A blend and its residual ‖Δ − BA‖ / ‖Δ‖ (Frobenius): what the rank lost, by module and over all together.

    `scale` is the strength of the whole, the given one or the one found for "auto".
    """

    adapter: Adapter
    residuals: dict[str, float]
    residual: float
    scale: float = 1.0


class LayerParts(NamedTuple):
    """What is blended in one layer: the adapters by number, their weights, and the factor of the layer's blend."""

    adapters: list[int]
    weights: list[float]
    factor: float


def blend(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    method: str | Method = "linear",
    **options: Any,
) -> Adapter:
    """The adapter of `blend_with_residual`, which takes the same arguments."""
    return blend_with_residual(adapters, weights, rank, method, **options).adapter


def blend_with_residual(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    method: str | Method = "linear",
    density: float | None = None,
    scale: float | str = 1.0,
    seed: int = 0,
    layers: Sequence[LayerRule] = (),
    space: str | None = None,
    inputs: Inputs | None = None,
) -> BlendResult:
    """Merge adapters of one base into one, times `scale`.

    `method` is a name or a `Method`. `weights` None are the method's own: 1/N each, or 1 each where it sums task
    vectors. They may be negative; an adapter of weight 0 takes no part. `layers` give layers weights of their own.
    `density` is the share of entries kept, for the methods that drop some; `seed` is for the random ones. Without
    `rank` each module gets the sum of its adapters' ranks: exact for linear, slerp, task-arithmetic and all that runs
    in a smaller space, close to the best of that rank for the others. With `rank`, every module of a larger one gets
    its closest approximation. fp32, on the device of the adapters.

    `scale` "auto" is the number with which the blend, as it is written, has the mean energy of the adapters: ‖Δ‖² over
    the layers of the blend, weighted by |w|. A sum of adapters that point the same way is larger than each, one of
    adapters that cancel is smaller, and both are put right. `space` "core" runs a method in the core space. `inputs`
    are the layers' own, for the methods that look at them.

    UserError when weights, density, method or space do not fit, or the adapters are not of one base.
    """
    how = check_blend(adapters, weights, rank, method, density, scale, space)
    if (how.regress is None) != (inputs is None):
        raise UserError(f"{how.name} {'looks at no inputs' if inputs else NEEDS_INPUTS}")
    given = [float(weight) for weight in (how.weights(len(adapters)) if weights is None else weights)]
    density = how.density if density is None else density
    strength = float(scale) if scale != "auto" else 1.0
    merged, lost, whole, wanted = {}, {}, {}, 0.0
    parts = blend_parts(adapters, given, how, layers)
    for name in parts if inputs is None else inputs.begin(adapters, parts, how):
        active, taken, factor = parts[name]
        pairs = [adapters[i].tensors.get(name) for i in active]
        share = strength * factor
        if scale == "auto":
            energies = [w * (0.0 if pair is None else inner(pair, pair)) for pair, w in zip(pairs, map(abs, taken))]
            wanted += factor**2 * sum(energies) / sum(map(abs, taken))
        if how.coefficients is not None:
            shares = [share * c for c in _checked(how, name, how.coefficients(pairs, taken), len(pairs))]
            terms = [(pair, c) for pair, c in zip(pairs, shares) if pair is not None and c]
            if terms:
                a, b = _joined(terms)
                merged[name], lost[name], whole[name] = truncate_product(a, b, rank or a.shape[0])
            continue
        if how.regress is not None and inputs is not None:
            a, b = how.regress(pairs, taken, inputs.of(name))
            merged[name], lost[name], whole[name] = truncate_product(a, share * b, rank or a.shape[0])
            inputs.solved(name, merged[name])
            continue
        assert how.merge is not None
        draws = [_generator(seed, name, i) for i in active]
        left, right, deltas = project(pairs, space or how.space)
        delta = share * _checked(how, name, how.merge(deltas, taken, density or 1.0, draws), *deltas[0].shape)
        width = rank or sum(pair[0].shape[0] for pair in pairs if pair is not None)
        if left is None:
            width = min(width, *delta.shape)
            merged[name], lost[name], whole[name] = truncate_matrix(delta, width, _generator(seed, name, -1))
        else:
            merged[name], lost[name], whole[name] = truncate_product(*restore(left, right, delta), width)
    found = Adapter(merged)
    if scale == "auto":
        energy = delta_norm(found) ** 2
        if energy <= 1e-12 * wanted:
            raise UserError("the blend changes nothing, since its adapters cancel out; give other weights")
        strength = (wanted / energy) ** 0.5
        found = scaled(found, strength)
    total = sum(whole.values())
    residuals = {name: _share(lost[name], whole[name]) for name in merged}
    return BlendResult(found, residuals, _share(sum(lost.values()), total), strength)


def blend_parts(
    adapters: Sequence[Adapter], weights: Sequence[float], how: Method, layers: Sequence[LayerRule] = ()
) -> dict[str, LayerParts]:
    """What is blended in each layer of the result. Shapes are enough: the adapters may be on the meta device.

    UserError when a layer has two sizes, a rule does not fit, and when nothing is left.
    """
    names = sorted({name for adapter in adapters for name in adapter.tensors})
    check_rules(layers, names, len(adapters))
    for rule in layers:
        if len(rule.numbers) > 1:
            check_weights(how, rule.numbers, len(adapters))
    found = {}
    for name in names:
        here, factor = weights_of(name, layers, weights)
        active = [i for i, weight in enumerate(here) if weight or how.adapters]
        held = [adapters[i].tensors[name] for i in active if name in adapters[i].tensors]
        sizes = {(a.shape[1], b.shape[0]) for a, b in held}
        if len(sizes) > 1:
            raise UserError(
                f"the adapters were made for different bases: {name} maps {few(f'{i} to {o}' for i, o in sizes)}; "
                "blend adapters of one base"
            )
        if held and factor:
            found[name] = LayerParts(active, [here[i] for i in active], factor)
    if not found and names:
        raise UserError("the weights of the layers leave nothing to blend; keep some layers at a weight other than 0")
    return found


def blend_ranks(
    adapters: Sequence[Adapter], parts: dict[str, LayerParts], how: Method, rank: int | None, space: str | None = None
) -> dict[str, int]:
    """The rank of each layer of the blend, at most: in a small space adapters may share directions."""
    ranks = {}
    for name, (active, _, _) in parts.items():
        held = [adapters[i].tensors[name] for i in active if name in adapters[i].tensors]
        total = sum(a.shape[0] for a, _ in held)
        shape = held[0][0].shape[1], held[0][1].shape[0]
        if how.coefficients is not None or how.regress is not None:
            ranks[name] = min(total, rank or total)
        elif (space or how.space) == "full":
            ranks[name] = min(rank or total, *shape)
        else:
            ranks[name] = min(total, rank or total, *shape)
    return ranks


def check_blend(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    rank: int | None,
    method: str | Method,
    density: float | None = None,
    scale: float | str = 1.0,
    space: str | None = None,
) -> Method:
    """The method; UserError when an argument does not fit it."""
    how = method_of(method)
    if not adapters or (weights is not None and len(adapters) != len(weights)):
        raise UserError(
            f"{len(adapters)} adapters and {len(weights or ())} weights cannot be blended; give each its own weight"
        )
    if rank is not None and rank < 1:
        raise UserError(f"an adapter of rank {rank} cannot be blended into; give a rank of 1 or more")
    check_weights(how, weights, len(adapters))
    if scale != "auto" and (isinstance(scale, str) or not 0 < abs(scale) <= LARGEST):
        shown = repr(scale) if isinstance(scale, str) else f"{scale:g}"
        raise UserError(f"the scale is {shown}; give a number other than 0, up to {LARGEST:g} in size, or auto")
    if density is not None and how.density is None:
        raise UserError(f"{how.name} keeps every entry, so it takes no density; leave the density out")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density {density:g} is no share of the entries; give a number above 0 and up to 1")
    if space is not None and space not in SPACES:
        raise UserError(f"there is no space {space!r}{did_you_mean(space, SPACES)}")
    if space == "core" and (how.coefficients is not None or how.regress is not None):
        what = "a sum" if how.regress is None else "a regression"
        raise UserError(f"{how.name} is {what}, which is the same in every space; leave the space out")
    return how


def check_weights(how: Method, weights: Sequence[float] | None, adapters: int) -> None:
    """UserError when a method does not take this number of adapters, or these weights."""
    if weights is not None and (not all(abs(weight) <= LARGEST for weight in weights) or not any(weights)):
        raise UserError(
            f"blend weights {list(weights)} are all 0, or one is beyond ±{LARGEST:g} or no number; give weights about 1"
        )
    if how.adapters is not None and adapters != how.adapters:
        raise UserError(f"{how.name} blends {how.adapters} adapters and here are {adapters}; choose another method")
    if how.adapters is not None and weights is not None and (min(weights) < 0 or not sum(weights)):
        raise UserError(
            f"{how.name} goes from one adapter to the other; give two weights of 0 or more, not {list(weights)}"
        )


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The adapter at another strength: `scale` folded into B. The adapter itself at 1."""
    return adapter if scale == 1 else Adapter({name: (a, b * scale) for name, (a, b) in adapter.tensors.items()})


def _checked(how: Method, layer: str, found: Any, *shape: int) -> Any:
    """What a method gave for a layer; UserError where it is not of that shape, or not finite."""
    numbers = found if isinstance(found, torch.Tensor) else torch.tensor(found, dtype=torch.float64)
    if tuple(numbers.shape) != shape or not numbers.isfinite().all():
        raise UserError(
            f"blend method {how.name} gave numbers of shape {tuple(numbers.shape)}, or infinite ones, for layer "
            f"{layer}; let it give finite numbers of shape {shape}"
        )
    return found


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
