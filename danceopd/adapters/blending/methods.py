"""The methods of `blend`, each with its paper: sums of factors, entry by entry, on singular vectors, by regression.

τ_i (out, in) is what adapter i adds to a weight, w_i its weight. An exact method is a weighted sum of the τ_i, so it
stays in factors. Others merge matrices: the τ_i themselves, or what they are in a smaller space (`subspace.py`). The
last look at the inputs that a layer gets (`danceopd.adapters.regression`). RegMean++ (arXiv 2508.03121) is RegMean on
the inputs that a layer gets in the merged network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.adapters.blending.entries import (
    Deltas,
    Weights,
    breadcrumbs,
    dare_linear,
    dare_ties,
    magnitude_prune,
    sce,
    ties,
)
from danceopd.adapters.blending.subspace import SPACES, iso_c, knots, tsv
from danceopd.adapters.regression.methods import regmean, ssr
from danceopd.adapters.regression.moments import Moments
from danceopd.adapters.svd import Factors
from danceopd.errors import UserError
from danceopd.plugins import load


@dataclass(frozen=True)
class Method:
    """One way to blend. Exact methods have `coefficients` of a weighted sum, others `merge` matrices, and those that
    look at the layers' inputs `regress`."""

    name: str
    density: float | None = None  # the default density; None: the method keeps every entry
    mean: bool = True  # weights that are not given are 1/N each; False: 1 each
    random: bool = False  # whether the result depends on the seed
    adapters: int | None = None  # the number of adapters it takes; None: any
    coefficients: Callable[[Sequence[Factors | None], Weights], list[float]] | None = None
    merge: Callable[[Deltas, Weights, float, Sequence[torch.Generator]], Tensor] | None = None
    space: str = "full"  # the space of `subspace.project` in which `merge` runs unless another is asked for
    regress: Callable[[Sequence[Factors | None], Weights, Moments], Factors] | None = None
    latent: bool = False  # whether `regress` needs the moments of A x in place of those of x
    sequential: bool = False  # whether a layer's inputs are those of the network with all layers before it blended
    prompts: int = 8  # of each adapter, whose inputs are recorded unless another number is asked for

    def weights(self, adapters: int) -> list[float]:
        """The default weights."""
        return [1 / adapters if self.mean else 1.0] * adapters


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
    size = math.sqrt(inner(first, first) * inner(second, second))
    omega = math.acos(max(-1.0, min(1.0, inner(first, second) / size))) if size else 0.0
    if math.sin(omega) < 1e-4:
        return [1 - t, t]
    return [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]


def inner(one: Factors, other: Factors) -> float:
    """⟨B_1 A_1, B_2 A_2⟩, from the factors."""
    (a1, b1), (a2, b2) = one, other
    return float(((b1.double().T @ b2.double()) * (a1.double() @ a2.double().T)).sum())


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
        Method("knots", density=0.2, merge=knots, space="outputs"),
        Method("tsv", mean=False, merge=tsv, space="core"),
        Method("iso-c", mean=False, merge=iso_c, space="core"),
        Method("regmean", mean=False, regress=regmean),
        Method("regmean++", mean=False, regress=regmean, sequential=True),
        Method("ssr", mean=False, regress=ssr, latent=True, prompts=1),
    )
}


def method_of(method: str | Method) -> Method:
    """The method of a name, built in or a plug-in, or the one that is given; UserError for what is none."""
    how = method
    if not isinstance(how, Method):
        how = load("blend method", how, METHODS, lambda value: isinstance(value, Method))
    ways = [way for way in (how.coefficients, how.merge, how.regress) if way is not None]
    if len(ways) != 1 or how.space not in (*SPACES, "outputs"):
        raise UserError(
            f"blend method {how.name} needs one of coefficients, merge and regress, and the space full, outputs or "
            "core; mend it"
        )
    return how
