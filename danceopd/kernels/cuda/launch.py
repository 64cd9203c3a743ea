"""Launch the CUDA kernels of `csrc/`: the functions of `reference.py` with the same arguments, one launch each.

Each fills an argument struct (`structs.py`) with pointers and strides. `backend.use_kernel` has checked the inputs,
except for where they start in memory (`_aligned_copy`). Outputs are dense, except gradients, which go where the caller
wants them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from danceopd.kernels.cuda import driver
from danceopd.kernels.cuda.structs import AddNorm, CStream, Prep, Strides, Strides4, Swiglu
from danceopd.kernels.inputs import SplitStream, stream_offsets

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WEIGHT_FP32, ROUND_FIRST, NO_NORM = 1, 2, 4
NORM = {"none": 0, "layer": 1, "rms": 2}
ADD_NORM_WEIGHT_FP32, ADD_NORM_Y_WEIGHT_FP32, ADD_NORM_ROUND_FIRST, ADD_NORM_Y_RMS = 4, 8, 16, 32


def _strides(x: Tensor | None) -> Strides:
    """Batch and token strides of `(B, S, …)`; 0 for a dimension of size one, which is broadcast."""
    return _strides_of(1, 1, 0, 0) if x is None else _strides_of(*x.shape[:2], *x.stride()[:2])


@lru_cache(maxsize=4096)  # a call repeats those of the call before; a struct is copied into its argument
def _strides_of(batch: int, tokens: int, of_batch: int, of_tokens: int) -> Strides:
    return Strides(0 if batch == 1 else of_batch, 0 if tokens == 1 else of_tokens)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _aligned_copy(x: Any) -> Any:
    """`x`, or a copy if it does not start at a multiple of 16 bytes, which a trace could not check.

    Hold the result until the launch.
    """
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _aligned(part: SplitStream) -> SplitStream:
    return SplitStream(*map(_aligned_copy, part))


# Attention inputs


def _threads(row: int, heads: int) -> int:
    """Block size, a multiple of 32 up to 192, that leaves the fewest rows idle; the larger of equals."""
    sizes = range(192, 95, -32)  # THREADS of qkv_prep.cu is the largest
    rounds = {size: -(-heads // (size // row)) * (size // row) for size in sizes}
    return min(sizes, key=lambda size: (rounds[size] - heads) / heads)


def _flags(weight: Tensor | None, round_first: bool) -> int:
    if weight is None:
        return NO_NORM
    return WEIGHT_FP32 if weight.dtype == torch.float32 else ROUND_FIRST if round_first else 0


def _rope_strides(cos: Tensor | None) -> Strides:
    if cos is None:
        return Strides(0, 0)
    return Strides(cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0, cos.stride(-2))


def _stream(part: SplitStream, d: SplitStream | None, first: int, round_first: bool, partial: Tensor | None) -> CStream:
    d_at = (_strides(d.q), _strides(d.k), _strides(d.v)) if d is not None else (Strides(),) * 3
    pointers = [*part, *(d[:3] if d is not None else (None,) * 3), partial]
    return CStream(
        *(_pointer(x) for x in pointers),
        _strides(part.q),
        _strides(part.k),
        _strides(part.v),
        _rope_strides(part.cos),
        *d_at,
        part.q.shape[1],
        first,
        _flags(part.weight_q, round_first),
        0,
    )


def _prep(image: SplitStream, text: SplitStream | None, eps: float, text_first: bool) -> tuple[Prep, int, int]:
    """The struct without streams, and the first rows of image and text."""
    n, m = image.q.shape[1], 0 if text is None else text.q.shape[1]
    return Prep(heads=image.q.shape[2], tokens=n + m, eps=eps), *stream_offsets(image, text, text_first)


def _run_prep(entry: str, image: SplitStream, argument: Prep) -> None:
    batch, _, heads, head_dim = image.q.shape
    used = head_dim * image.q.element_size() // 16
    row = 8 if used <= 8 else 16 if used <= 16 else 32
    defines = {"DTYPE": DTYPES[image.q.dtype], "HEAD_DIM": head_dim}
    driver.launch(image.q, "qkv_prep", entry, defines, (argument.tokens, batch), _threads(row, heads), argument)


def qkv_prep(
    out: tuple[Tensor, Tensor, Tensor | None],
    image: SplitStream,
    text: SplitStream | None,
    eps: float,
    round_first: bool,
    text_first: bool,
) -> None:
    """See `reference.qkv_prep`; `out` is dense."""
    image, text = _aligned(image), None if text is None else _aligned(text)
    argument, image_first, first = _prep(image, text, eps, text_first)
    argument.image = _stream(image, None, image_first, round_first, None)
    if text is not None:
        argument.text = _stream(text, None, first, round_first, None)
    argument.q, argument.k, argument.v = (_pointer(x) for x in out)
    _run_prep("qkv_prep_forward", image, argument)


def qkv_prep_backward(
    grads: tuple[Tensor, Tensor, Tensor | None],
    image: SplitStream,
    text: SplitStream | None,
    d_image: SplitStream,
    d_text: SplitStream | None,
    eps: float,
    text_first: bool,
    weights: bool,
) -> list[tuple[Tensor, Tensor]]:
    """See `reference.qkv_prep_backward`."""
    image, text = _aligned(image), None if text is None else _aligned(text)
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


# Gate, add, normalise, modulate


def _add_norm(
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
) -> AddNorm:
    flags = NORM[kind] | (ADD_NORM_Y_RMS if rms_y else 0)
    if weight is not None:
        flags |= ADD_NORM_WEIGHT_FP32 if weight.dtype == torch.float32 else ADD_NORM_ROUND_FIRST
    if y_weight is not None and y_weight.dtype == torch.float32:
        flags |= ADD_NORM_Y_WEIGHT_FP32
    argument = AddNorm(*(_pointer(t) for t in (x, y, gate, y_weight, weight, scale, shift)))
    for name, tensor in (("x", x), ("y", y), ("gate", gate), ("scale", scale), ("shift", shift)):
        setattr(argument, f"{name}_at", _strides(tensor))
    argument.out_batch, argument.width, argument.flags = x.shape[1] * x.shape[2], x.shape[2], flags
    argument.eps, argument.y_eps = eps, y_eps
    return argument


def _run_add_norm(entry: str, x: Tensor, argument: AddNorm) -> None:
    chunks = -(-x.shape[2] * x.element_size() // 16)
    per_thread = -(-chunks // 256)
    threads = -(-chunks // per_thread // 32) * 32
    defines = {"DTYPE": DTYPES[x.dtype], "PER_THREAD": per_thread}
    driver.launch(x, "add_norm", entry, defines, (x.shape[1], x.shape[0]), threads, argument)


def add_norm(
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
    """See `reference.add_norm`; `total` and `out` are dense."""
    x, y, gate, y_weight, weight, scale, shift = map(_aligned_copy, (x, y, gate, y_weight, weight, scale, shift))
    argument = _add_norm(x, y, gate, y_weight, weight, scale, shift, kind, rms_y, eps, y_eps)
    argument.sum, argument.normed = _pointer(total), _pointer(out)
    _run_add_norm("add_norm_forward", x, argument)


def add_norm_backward(
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
    """See `reference.add_norm_backward`; `dx` and `dy` are dense."""
    kind = "none" if grad_out is None else kind
    total, y, gate, y_weight, weight, scale = map(_aligned_copy, (total, y, gate, y_weight, weight, scale))
    argument = _add_norm(total, y, gate, y_weight, weight, scale, None, kind, rms_y, eps, y_eps)
    grads = [None if grad is None else _rows(grad) for grad in (grad_total, grad_out)]
    argument.grad_sum, argument.grad_normed = (_pointer(grad) for grad in grads)
    argument.grad_sum_at, argument.grad_normed_at = (_strides(grad) for grad in grads)
    argument.dx, argument.dy = _pointer(dx), _pointer(dy)
    _run_add_norm("add_norm_backward", total, argument)


# SwiGLU


def _run_swiglu(entry: str, **tensors: Tensor | None) -> None:
    tensors |= {name: _aligned_copy(tensors.get(name)) for name in ("gate", "up", "passed")}
    gate, passed = tensors["gate"], tensors.get("passed")
    assert gate is not None
    argument = Swiglu(width=gate.shape[2], passed_width=0 if passed is None else passed.shape[2])
    for name, tensor in tensors.items():
        setattr(argument, name, _pointer(tensor))
        setattr(argument, f"{name}_at", _strides(tensor))
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

