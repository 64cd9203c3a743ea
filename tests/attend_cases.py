"""Ragged attention through a kernel backend, through SDPA on each sample alone, and in float64.

`python attend_cases.py triton` prints for each case the relative errors of both against float64. As in
`kernel_cases.py`, what torch allocates is filled with NaN. Triton's interpreter multiplies no bf16 matrices, so there
those cases are left out.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from kernel_cases import draw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from danceopd.attention import using
from danceopd.attention.masks import rows_of
from danceopd.attention.ragged import ragged_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """`mask` hides text, so tokens are listed; `lengths` are samples of one packed row; else rows are dense."""

    dtype: torch.dtype
    dim: int
    tokens: int
    heads: int = 2
    mask: tuple[tuple[int, int], ...] = ()  # for each row: text tokens there, text tokens in all
    lengths: tuple[int, ...] = ()
    source: int = 0
    loud: float = 1.0  # of the scores


CASES = {
    "listed-128-bf16": Case(BF16, 128, 150, mask=((40, 40), (7, 40))),
    "listed-64-fp16": Case(FP16, 64, 133, mask=((133, 133), (5, 133), (64, 133)), loud=4.0),
    "listed-96-fp16": Case(FP16, 96, 70, 3, mask=((0, 9), (9, 9))),
    "packed-96-fp16": Case(FP16, 96, 201, lengths=(70, 1, 130)),
    "packed-128-bf16": Case(BF16, 128, 129, lengths=(64, 65), loud=6.0),
    "source-128-bf16": Case(BF16, 128, 70, source=90),
    "source-64-fp16": Case(FP16, 64, 64, 3, source=64),
    "listed-source-64-fp16": Case(FP16, 64, 90, mask=((3, 30), (30, 30)), source=5),
    "listed-source-128-fp32": Case(FP32, 128, 80, 1, mask=((3, 30), (30, 30)), source=70),
    "packed-64-fp32": Case(FP32, 64, 70, lengths=(3, 67), loud=6.0),
}


def inputs(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v (strided views of one packed projection) and source, in float64 of the case's values; the arguments."""
    rows = len(case.mask) or (1 if case.lengths else 2)
    width = case.heads * case.dim
    packed = draw(1, rows, case.tokens, 3 * width + 16)
    packed[..., : 2 * width] *= case.loud**0.5
    q, k, v = (x.unflatten(-1, (case.heads, case.dim)) for x in packed[..., : 3 * width].split(width, dim=-1))
    samples = len(case.lengths) or rows
    more = [draw(2 + i, samples, case.source, case.heads, case.dim) for i in range(2)] if case.source else []
    cumulative = tokens = None
    longest = max(case.lengths, default=case.tokens)
    if case.mask:
        there = torch.arange(case.mask[0][1]) < torch.tensor([n for n, _ in case.mask])[:, None]
        cumulative, tokens, _, longest = rows_of(there, case.tokens)
    elif case.lengths:
        cumulative = torch.tensor([0, *case.lengths]).cumsum(0).int()
    return [x.to(case.dtype).double() for x in (q, k, v, *more)], {
        "cumulative": cumulative,
        "tokens": tokens,
        "longest": longest,
    }


def strided(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """In `dtype`, its rows apart as in a packed projection."""
    wide = torch.empty(*x.shape[:2], 3, *x.shape[2:], dtype=dtype, device=device)
    wide[:, :, 1] = x
    return wide[:, :, 1]


def kernel(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    tensors, facts = inputs(case)
    q, k, v, *more = (strided(x, dtype, device) for x in tensors)
    facts = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in facts.items()}
    longest = facts.pop("longest")
    with using(backend):
        out = ragged_attention(q, k, v, *facts.values(), *(more or (None, None)), longest, case.dim**-0.5)
    return out.cpu()


def samples(case: Case) -> list[tuple[int, Tensor]]:
    """The batch row and the tokens of each sample, found without the code under test."""
    if case.mask:
        return [
            (row, torch.tensor([*range(there), *range(text, case.tokens)]))
            for row, (there, text) in enumerate(case.mask)
        ]
    if case.lengths:
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        return [(0, torch.arange(end - n, end)) for n, end in zip(case.lengths, ends)]
    return [(row, torch.arange(case.tokens)) for row in range(2)]


def alone(case: Case, dtype: torch.dtype) -> Tensor:
    """SDPA of each sample by itself; zeros where nobody is."""
    q, k, v, *more = (x.to(dtype) for x in inputs(case)[0])
    out = torch.zeros(q.shape, dtype=dtype)
    for sample, (row, own) in enumerate(samples(case)):
        parts = [x[row, own] for x in (q, k, v)]
        if more:
            parts[1:] = [torch.cat([x[sample], part]) for x, part in zip(more, parts[1:])]  # order does not matter
        out[row, own] = scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(0, 1)
    return out


def compare(name: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """Relative errors against float64 of the backend and of SDPA, and what stands where no token is."""
    case = CASES[name]
    found, exact, eager = kernel(case, backend, case.dtype, device), alone(case, torch.float64), alone(case, case.dtype)
    size = exact.norm()
    hidden = found[exact.abs().sum(dim=(2, 3)) == 0]
    return {
        "case": name,
        "error": ((found.double() - exact).norm() / size).item(),
        "eager": ((eager.double() - exact).norm() / size).item(),
        "hidden": hidden.abs().sum().item(),
    }


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    for case in [name for name, case in CASES.items() if sys.argv[1] != "triton" or case.dtype != BF16]:
        print(json.dumps(compare(case, sys.argv[1])), flush=True)
