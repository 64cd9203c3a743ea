"""Ragged attention through a kernel backend, through SDPA on each sample alone, and in float64; also with a prologue.

`python attention_cases.py triton` prints for each case the relative errors of both against float64. As in
`kernel_cases.py`, what torch allocates is filled with NaN. Triton's interpreter multiplies no bf16 matrices, so it
skips those cases.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch
from kernel_cases import EPS, angles, draw, pairs, twice
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from danceopd.kernels import reference, using
from danceopd.kernels.inputs import Stream, split_heads
from danceopd.kernels.masks import unpad
from danceopd.kernels.ops.attention_ops import qkv_prep
from danceopd.kernels.ops.ragged_ops import prepared_attention, ragged_attention

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
    return [x.to(case.dtype).double() for x in (q, k, v, *more)], facts(case)


def facts(case: Case | Form) -> dict[str, Any]:
    """The visible tokens, as the operators take them."""
    cu_seqlens = tokens = None
    max_seqlen = max(case.lengths, default=case.tokens)
    if case.mask:
        there = torch.arange(case.mask[0][1]) < torch.tensor([n for n, _ in case.mask])[:, None]
        cu_seqlens, tokens, _, max_seqlen = unpad(there, case.tokens)
    elif case.lengths:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).int()
    return {"cu_seqlens": cu_seqlens, "tokens": tokens, "max_seqlen": max_seqlen}


def strided(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The values in `dtype`, strided as in a packed projection."""
    wide = torch.empty(*x.shape[:2], 3, *x.shape[2:], dtype=dtype, device=device)
    wide[:, :, 1] = x
    return wide[:, :, 1]


def kernel(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    tensors, facts = inputs(case)
    q, k, v, *more = (strided(x, dtype, device) for x in tensors)
    facts = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in facts.items()}
    max_seqlen = facts.pop("max_seqlen")
    with using(backend):
        out = ragged_attention(q, k, v, *facts.values(), *(more or (None, None)), max_seqlen, case.dim**-0.5)
    return out.cpu()


def samples(case: Case | Form) -> list[tuple[int, Tensor]]:
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
    """SDPA of each sample by itself; zeros where no token is."""
    return each(case, *(x.to(dtype) for x in inputs(case)[0]))


def each(case: Case | Form, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype)
    for sample, (row, own) in enumerate(samples(case)):
        parts = [x[row, own] for x in (q, k, v)]
        if more:
            parts[1:] = [torch.cat([x[sample], part]) for x, part in zip(more, parts[1:])]  # order does not matter
        out[row, own] = scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(0, 1)
    return out


def compare(name: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """Relative errors against float64 of the backend and of SDPA, and the output where no token is."""
    case = CASES[name]
    found = kernel(case, backend, case.dtype, device)
    return errors(name, found, alone(case, torch.float64), alone(case, case.dtype))


def errors(name: str, found: Tensor, exact: Tensor, eager: Tensor) -> dict[str, Any]:
    size = exact.norm()
    hidden = found[exact.abs().sum(dim=(2, 3)) == 0]
    return {
        "case": name,
        "error": ((found.double() - exact).norm() / size).item(),
        "eager": ((eager.double() - exact).norm() / size).item(),
        "hidden": hidden.abs().sum().item(),
    }


# With norm and rotation in the prologue


class Form(NamedTuple):
    """Streams of `image` and `text` tokens as projections leave them. `rope`: "", "twice", "pairs" or "batch"."""

    dtype: torch.dtype
    dim: int
    image: int
    text: int
    rope: str
    mask: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] = ()
    source: int = 0
    heads: int = 2
    norm: bool = True
    wide: bool = False  # norm weights in fp32
    round_first: bool = False
    text_first: bool = True

    @property
    def tokens(self) -> int:
        return self.image + self.text


FORMS = {
    "flux-128-bf16": Form(BF16, 128, 85, 40, "twice", mask=((40, 40), (7, 40))),
    "flux-128-fp32": Form(FP32, 128, 40, 30, "twice", mask=((30, 30), (1, 30)), source=3, heads=1),
    "qwen-96-fp16": Form(FP16, 96, 50, 20, "pairs", mask=((3, 20), (20, 20)), heads=1, round_first=True),
    "image-first-64-fp16": Form(FP16, 64, 63, 5, "", ((5, 64), (64, 64)), heads=1, round_first=True, text_first=False),
    "image-first-source-64-fp16": Form(FP16, 64, 60, 9, "twice", source=70, wide=True, text_first=False),
    "one-stream-128-bf16": Form(BF16, 128, 67, 0, "batch", mask=((11, 30), (30, 30)), round_first=True, heads=1),
    "packed-64-fp16": Form(FP16, 64, 131, 0, "pairs", lengths=(64, 1, 66), heads=1),
    "unnormed-96-fp16": Form(FP16, 96, 40, 3, "batch", source=64, norm=False, text_first=False, heads=1),
}


def streams(form: Form, dtype: torch.dtype, device: str = "cpu") -> tuple[Stream, Stream | None, list[Tensor]]:
    """Image (separate, strided), text (packed) and source, of the form's values in `dtype`."""
    width, rows = form.heads * form.dim, len(form.mask) or (1 if form.lengths else 2)
    move = lambda x: x.to(form.dtype).to(device, dtype)  # noqa: E731
    half = rows if form.rope == "batch" else None, form.tokens, form.dim // 2
    angle = angles(*(n for n in half if n))
    table = (pairs if form.rope in ("pairs", "batch") else twice)(angle, torch.empty(0, dtype=dtype, device=device))
    first = slice(form.text, None) if form.text_first else slice(0, form.image)
    second = slice(0, form.text) if form.text_first else slice(form.image, None)

    def facts(seed: int, rows: slice) -> list[Tensor | None]:
        weights = [move(1 + 0.5 * draw(seed + i, form.dim)) if form.norm else None for i in range(2)]
        if form.wide and dtype != torch.float64:
            weights = [None if w is None else w.float() for w in weights]
        return [*weights, *(None if t is None or not form.rope else t[..., rows, :] for t in table)]

    x, y = (move(draw(seed, rows, n, 3 * width + 16)) for seed, n in ((0, form.image), (1, form.text)))
    image = Stream(*x[..., : 3 * width].split(width, dim=-1), *facts(2, first))
    text = Stream(y[..., 16:], None, None, *facts(4, second)) if form.text else None
    count = len(form.lengths) or rows
    more = [move(draw(6 + i, count, form.source, form.heads, form.dim)) for i in range(2)] if form.source else []
    return image, text, more


def fixed(form: Form) -> tuple[int, float, bool, bool]:
    return form.dim, EPS, form.round_first, form.text_first


def arguments(form: Form, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments of `prepared_attention`."""
    image, text, more = streams(form, dtype, device)
    visible = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in facts(form).items()}
    max_seqlen = visible.pop("max_seqlen")
    rest = (None,) * 7 if text is None else text
    return *image, *rest, *visible.values(), *(more or (None, None)), max_seqlen, *fixed(form), form.dim**-0.5


def prepared(form: Form, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """In one kernel."""
    with using(backend):
        return prepared_attention(*arguments(form, dtype, device)).cpu()


def unfused(form: Form, backend: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """`qkv_prep`, then `ragged_attention`."""
    given = arguments(form, dtype, device)
    with using(backend):
        return ragged_attention(*qkv_prep(*given[:14], *fixed(form)), *given[14:19], given[-1]).cpu()


def eager(form: Form, dtype: torch.dtype) -> Tensor:
    """Plain torch, each sample by itself."""
    image, text, more = streams(form, dtype)
    parts = split_heads(image, form.dim), None if text is None else split_heads(text, form.dim)
    return each(form, *reference.joint(*parts, *fixed(form)[1:]), *more)


def compare_prepared(name: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """As `compare`; and how far the kernel is from the unfused path on the same backend, in its own rounding."""
    form = FORMS[name]
    found, apart = (run(form, backend, form.dtype, device) for run in (prepared, unfused))
    row = errors(f"prologue {name}", found, eager(form, torch.float64), eager(form, form.dtype))
    return {**row, "apart": (found != apart).double().mean().item()}


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    for case in [name for name, case in CASES.items() if sys.argv[1] != "triton" or case.dtype != BF16]:
        print(json.dumps(compare(case, sys.argv[1])), flush=True)
    for name in [name for name, form in FORMS.items() if sys.argv[1] != "triton" or form.dtype != BF16]:
        print(json.dumps(compare_prepared(name, sys.argv[1])), flush=True)
