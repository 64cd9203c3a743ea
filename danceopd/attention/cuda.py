"""The CUDA kernels of `csrc/` behind the same functions as `reference`: pointers and strides out, one launch each.

Inputs have passed the envelope of `choose.py`, but for where they start (`_placed`); outputs are dense, except
gradients, which go where the caller wants them. The structs are those of `structs.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import driver
from .parts import Part, first_rows
from .structs import Attend, AttendStream, CStream, Prep, Site, Strides, Strides4, Swiglu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHT_FP32, ROUND_FIRST, NO_NORM = 1, 2, 4
NORM = {"none": 0, "layer": 1, "rms": 2}
SITE_WEIGHT_FP32, SITE_Y_WEIGHT_FP32, SITE_ROUND_FIRST, SITE_Y_RMS = 4, 8, 16, 32


def _at(x: Tensor | None) -> Strides:
    """Batch and token strides of `(B, S, …)`; a dimension of one row is the same for all."""
    if x is None:
        return Strides(0, 0)
    return Strides(*(0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2])))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _placed(x: Any) -> Any:
    """`x`, or a copy where it starts off 16 bytes: a trace could not ask, and memory may come from elsewhere.

    Hold what it returns until the launch.
    """
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _part(part: Part) -> Part:
    return Part(*map(_placed, part))


# Attention inputs


def _threads(row: int, heads: int) -> int:
    """Block size, a multiple of 32 up to 192, that leaves the fewest rows idle, larger ones first."""
    sizes = range(192, 95, -32)  # THREADS of qkv_prep.cu is the largest
    rounds = {size: -(-heads // (size // row)) * (size // row) for size in sizes}
    return min(sizes, key=lambda size: (rounds[size] - heads) / heads)


def _flags(weight: Tensor | None, round_first: bool) -> int:
    if weight is None:
        return NO_NORM
    return WEIGHT_FP32 if weight.dtype == torch.float32 else ROUND_FIRST if round_first else 0


def _rope_at(cos: Tensor | None) -> Strides:
    if cos is None:
        return Strides(0, 0)
    return Strides(cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0, cos.stride(-2))


def _stream(part: Part, d: Part | None, first: int, round_first: bool, partial: Tensor | None) -> CStream:
    d_at = (_at(d.q), _at(d.k), _at(d.v)) if d is not None else (Strides(),) * 3
    pointers = [*part, *(d[:3] if d is not None else (None,) * 3), partial]
    return CStream(
        *(_pointer(x) for x in pointers),
        _at(part.q),
        _at(part.k),
        _at(part.v),
        _rope_at(part.cos),
        *d_at,
        part.q.shape[1],
        first,
        _flags(part.weight_q, round_first),
        0,
    )


def _prep(image: Part, text: Part | None, eps: float, text_first: bool) -> tuple[Prep, int, int]:
    """The struct without streams, and the first rows of image and text."""
    n, m = image.q.shape[1], 0 if text is None else text.q.shape[1]
    argument = Prep(heads=image.q.shape[2], tokens=n + m, eps=eps)
    return argument, m if text_first else 0, 0 if text_first else n


def _run_prep(entry: str, image: Part, argument: Prep) -> None:
    batch, _, heads, head_dim = image.q.shape
    used = head_dim * image.q.element_size() // 16
    row = 8 if used <= 8 else 16 if used <= 16 else 32
    defines = {"DTYPE": DTYPES[image.q.dtype], "HEAD_DIM": head_dim}
    driver.launch(image.q, "qkv_prep", entry, defines, (argument.tokens, batch), _threads(row, heads), argument)


def qkv_prep(
    out: tuple[Tensor, Tensor, Tensor | None],
    image: Part,
    text: Part | None,
    eps: float,
    round_first: bool,
    text_first: bool,
) -> None:
    """See `reference.qkv_prep`; `out` is dense."""
    image, text = _part(image), None if text is None else _part(text)
    argument, image_first, first = _prep(image, text, eps, text_first)
    argument.image = _stream(image, None, image_first, round_first, None)
    if text is not None:
        argument.text = _stream(text, None, first, round_first, None)
    argument.q, argument.k, argument.v = (_pointer(x) for x in out)
    _run_prep("qkv_prep_forward", image, argument)


def qkv_prep_backward(
    grads: tuple[Tensor, Tensor, Tensor | None],
    image: Part,
    text: Part | None,
    d_image: Part,
    d_text: Part | None,
    eps: float,
    text_first: bool,
    weights: bool,
) -> list[tuple[Tensor, Tensor]]:
    """See `reference.qkv_prep_backward`."""
    image, text = _part(image), None if text is None else _part(text)
    argument, image_first, first = _prep(image, text, eps, text_first)
    aligned = [None if grad is None else _rows(grad) for grad in grads]
    partials = []
    for part, d, start, field in ((image, d_image, image_first, "image"), (text, d_text, first, "text")):
        if part is None:
            continue
        partial = None
        if weights:
            batch, tokens, _, head_dim = part.q.shape
            partial = part.q.new_empty(batch * tokens, 2, head_dim, dtype=torch.float32)
            partials.append(partial)
        setattr(argument, field, _stream(part, d, start, False, partial))
    argument.grad_q, argument.grad_k, argument.grad_v = (_pointer(x) for x in aligned)
    for name, grad in zip("qkv", aligned):
        setattr(argument, f"grad_{name}_at", Strides4(0, 0, 0) if grad is None else Strides4(*grad.stride()[:3]))
    _run_prep("qkv_prep_backward", image, argument)
    return [(total[0], total[1]) for total in (partial.sum(0) for partial in partials)]


def _rows(x: Tensor) -> Tensor:
    """`x` itself if its rows can be read 16 bytes at a time, else a dense copy."""
    step = 16 // x.element_size()
    fits = x.stride(-1) == 1 and all(stride % step == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


# Norm sites


def _site(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    y_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    rms_y: bool,
    eps: float,
    y_eps: float,
) -> Site:
    flags = NORM[kind] | (SITE_Y_RMS if rms_y else 0)
    if weight is not None:
        flags |= SITE_WEIGHT_FP32 if weight.dtype == torch.float32 else SITE_ROUND_FIRST
    if y_weight is not None and y_weight.dtype == torch.float32:
        flags |= SITE_Y_WEIGHT_FP32
    site = Site(*(_pointer(t) for t in (x, y, gate, y_weight, weight, scale, shift)))
    for name, tensor in (("x", x), ("y", y), ("gate", gate), ("scale", scale), ("shift", shift)):
        setattr(site, f"{name}_at", _at(tensor))
    site.out_batch, site.width, site.flags = x.shape[1] * x.shape[2], x.shape[2], flags
    site.eps, site.y_eps = eps, y_eps
    return site


def _run_site(entry: str, x: Tensor, argument: Site) -> None:
    chunks = -(-x.shape[2] * x.element_size() // 16)
    per_thread = -(-chunks // 256)
    threads = -(-chunks // per_thread // 32) * 32
    defines = {"DTYPE": DTYPES[x.dtype], "PER_THREAD": per_thread}
    driver.launch(x, "norm_site", entry, defines, (x.shape[1], x.shape[0]), threads, argument)


def norm_site(
    total: Tensor | None,
    out: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    y_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    rms_y: bool,
    eps: float,
    y_eps: float,
) -> None:
    """See `reference.norm_site`; `total` and `out` are dense."""
    x, y, gate, y_weight, weight, scale, shift = map(_placed, (x, y, gate, y_weight, weight, scale, shift))
    argument = _site(x, y, gate, y_weight, weight, scale, shift, kind, rms_y, eps, y_eps)
    argument.sum, argument.normed = _pointer(total), _pointer(out)
    _run_site("norm_site_forward", x, argument)


def norm_site_backward(
    dx: Tensor,
    dy: Tensor | None,
    grad_total: Tensor | None,
    grad_out: Tensor | None,
    total: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    y_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    kind: str,
    rms_y: bool,
    eps: float,
    y_eps: float,
) -> None:
    """See `reference.norm_site_backward`; `dx` and `dy` are dense."""
    kind = "none" if grad_out is None else kind
    total, y, gate, y_weight, weight, scale = map(_placed, (total, y, gate, y_weight, weight, scale))
    argument = _site(total, y, gate, y_weight, weight, scale, None, kind, rms_y, eps, y_eps)
    grads = [None if grad is None else _rows(grad) for grad in (grad_total, grad_out)]
    argument.grad_sum, argument.grad_normed = (_pointer(grad) for grad in grads)
    argument.grad_sum_at, argument.grad_normed_at = (_at(grad) for grad in grads)
    argument.dx, argument.dy = _pointer(dx), _pointer(dy)
    _run_site("norm_site_backward", total, argument)


# SwiGLU


def _run_swiglu(entry: str, **tensors: Tensor | None) -> None:
    tensors |= {name: _placed(tensors.get(name)) for name in ("gate", "up", "passed")}
    gate, passed = tensors["gate"], tensors.get("passed")
    assert gate is not None
    argument = Swiglu(width=gate.shape[2], passed_width=0 if passed is None else passed.shape[2])
    for name, tensor in tensors.items():
        setattr(argument, name, _pointer(tensor))
        setattr(argument, f"{name}_at", _at(tensor))
    chunks = argument.width * gate.element_size() // 16
    threads = min(256, -(-chunks // 32) * 32)
    defines = {"DTYPE": DTYPES[gate.dtype]}
    driver.launch(gate, "swiglu", entry, defines, (gate.shape[1], gate.shape[0]), threads, argument)


def swiglu(out: Tensor, gate: Tensor, up: Tensor, passed: Tensor | None) -> None:
    """See `reference.swiglu`."""
    _run_swiglu("swiglu_forward", gate=gate, up=up, passed=passed, out=out)


def swiglu_backward(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """See `reference.swiglu_backward`."""
    _run_swiglu("swiglu_backward", gate=gate, up=up, grad=_rows(grad), dgate=d_gate, dup=d_up)


# Attention


def _attend_stream(part: Part, first: int, round_first: bool) -> AttendStream:
    at = (*map(_at, part[:3]), _rope_at(part.cos))
    return AttendStream(*map(_pointer, part), *at, part.q.shape[1], first, _flags(part.weight_q, round_first), 0)


def _run_attend(
    kernel: str,
    out: Tensor,
    argument: Attend,
    cumulative: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    longest: int,
    scale: float,
) -> None:
    batch, length, heads, head_dim = out.shape
    samples = batch if cumulative is None else len(cumulative) - 1
    source_k, source_v = _placed(source_k), _placed(source_v)
    for name, tensor in (("source_k", source_k), ("source_v", source_v), ("out", out)):
        setattr(argument, name, _pointer(tensor))
        setattr(argument, f"{name}_at", _at(tensor))
    argument.cumulative, argument.tokens = _pointer(cumulative), _pointer(tokens)
    argument.heads, argument.length, argument.source = heads, length, 0 if source_k is None else source_k.shape[1]
    argument.scale = scale * math.log2(math.e)
    grid = (-(-longest // 64), samples * heads)  # TILE of attend.cuh
    defines = {"DTYPE": DTYPES[out.dtype], "HEAD_DIM": head_dim}
    driver.launch(out, kernel, kernel, defines, grid, 128, argument)


def ragged_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cumulative: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    longest: int,
    scale: float,
) -> None:
    """See `reference.ragged_attention`; `out` is dense."""
    part = _part(Part(q, k, v))
    argument = Attend(image=_attend_stream(part, 0, False))
    _run_attend("ragged_attention", out, argument, cumulative, tokens, source_k, source_v, longest, scale)


def prepared_attention(
    out: Tensor,
    image: Part,
    text: Part | None,
    cumulative: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    longest: int,
    eps: float,
    round_first: bool,
    text_first: bool,
    scale: float,
) -> None:
    """See `reference.prepared_attention`; `out` is dense."""
    image, text = _part(image), None if text is None else _part(text)
    first, of_text = first_rows(image, text, text_first)
    argument = Attend(image=_attend_stream(image, first, round_first), eps=eps)
    if text is not None:
        argument.text = _attend_stream(text, of_text, round_first)
    _run_attend("prepared_attention", out, argument, cumulative, tokens, source_k, source_v, longest, scale)
