"""RegMean and SSR: of one layer, the adapters, their strengths and their inputs' moments go in; A and B come out.

Both ask for a change τ that does to each adapter's own inputs what that adapter does: the least squares
Σ_k E_k‖τ x − w_k B_k A_k x‖². Its solution never needs an (out, in) matrix, and has the sum of the ranks exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from danceopd.adapters.blending.entries import Weights
from danceopd.adapters.regression.moments import Moments
from danceopd.adapters.svd import Factors

ALPHA = 0.9
"""RegMean multiplies what is off the diagonal of each Gram matrix by this, as its paper does by default."""
MEAN_RIDGE = 1e-6
"""How much the mean of the adapters counts in RegMean, as a share of the mean square of the inputs."""
RIDGE = 1e-4
"""SSR's ridge, as a share of each latent's mean square, so that it does not matter how an adapter shares its size
between A and B; the paper's is absolute."""


def regmean(pairs: Sequence[Factors | None], weights: Weights, moments: Moments, alpha: float = ALPHA) -> Factors:
    """RegMean (arXiv 2212.09849): τ = (Σ_k w_k τ_k Ĝ_k) (Σ_k Ĝ_k)⁻¹ with G_k = E_k[x xᵀ], Ĝ = α G + (1 − α) diag G.

    τ_k = B_k A_k, so only A is solved for: A' = [w_k A_k Ĝ_k] (Σ Ĝ_k)⁻¹. To each Ĝ_k a small multiple of the identity
    is added: where no input points, the result is the mean of the adapters, as in a plain blend. An adapter without
    this layer has τ_k = 0: on its inputs the layer should stay the base's.
    """
    total, count = moments.total.double(), len(pairs)
    mean = float(total.diagonal().mean())
    ridge = MEAN_RIDGE * mean / count if mean > 0 else 1.0
    whole = alpha * total
    whole.diagonal().add_((1 - alpha) * total.diagonal() + count * ridge)
    rows, up = [], []
    for pair, weight, crossed, diagonal in zip(pairs, weights, moments.crossed, moments.diagonals, strict=True):
        if pair is None or crossed is None:
            continue
        a = pair[0].to(whole)
        rows.append(weight * (alpha * crossed.double() + a * ((1 - alpha) * diagonal.double() + ridge)))
        up.append(pair[1])
    b = torch.cat(up, dim=1)
    return torch.linalg.solve(whole, torch.cat(rows).T).T.to(b), b  # moments may be on a GPU


def ssr(pairs: Sequence[Factors | None], weights: Weights, moments: Moments) -> Factors:
    """SSR-Merge (arXiv 2606.10617): with z = A x, A = [A_k], the router R = Q G⁻¹, and the blend B R A.

    G = Σ_k E_k[z zᵀ], Q = Σ_k E_k[(P_k z) zᵀ] with P_k the rows of adapter k: on its own inputs an adapter's latents
    pass and the others' are taken away. Adapters without this layer do not count, as in the paper's code; a layer that
    no input reached gets R = 1, the plain sum.
    """
    held = [(pair, w) for pair, w in zip(pairs, weights, strict=True) if pair is not None]
    a = torch.cat([pair[0] for pair, _ in held])
    b = torch.cat([w * pair[1] for pair, w in held], dim=1)
    gram = moments.total.double()
    size = gram.diagonal()
    if not bool((size > 0).any()):
        return a, b
    guide = torch.cat([crossed for crossed in moments.crossed if crossed is not None]).double()
    ridge = torch.where(size > 0, RIDGE * size, torch.ones_like(size))
    router = torch.linalg.solve(gram + torch.diag(ridge), guide.T).T.to(b.device)  # moments may be on a GPU
    return a, (b.double() @ router).float()
