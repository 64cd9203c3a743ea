"""The operators that prepare q, k and v for attention: `danceopd::qkv_prep` and `danceopd::parallel_prep`.

`torch.library` custom operators: functional (they allocate what they return), with shapes for tracing and a gradient
that is an operator, too, so `torch.compile` traces both directions and CUDA graphs capture them. `dispatch.run` calls
the implementation. An output that does not exist is an empty tensor, because an operator cannot return None.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from danceopd.kernels.inputs import Stream, joint_shape, split_heads
from danceopd.kernels.ops.dispatch import Maybe, none_if_empty, run, two_streams

# q, k, v


@torch.library.custom_op("danceopd::qkv_prep", mutates_args=())
def qkv_prep(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    text_weight_q: Tensor | None,
    text_weight_k: Tensor | None,
    text_cos: Tensor | None,
    text_sin: Tensor | None,
    head_dim: int,
    eps: float,
    round_first: bool,
    text_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.joint`. The first fourteen arguments are the fields of two `Stream`s, image and text."""
    args = (q, k, v, weight_q, weight_k, cos, sin, text_q, text_k, text_v, text_weight_q, text_weight_k)
    image, text = two_streams((*args, text_cos, text_sin))
    out = _joint_outputs(image, text, head_dim)
    parts = split_heads(image, head_dim), None if text is None else split_heads(text, head_dim)
    run("qkv_prep", q, (out[0], out[1], none_if_empty(out[2])), *parts, eps, round_first, text_first)
    return out


@qkv_prep.register_fake
def _(q: Tensor, k: Maybe, v: Maybe, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, *rest: Any) -> Any:
    image, text = two_streams((q, k, v, wq, wk, cos, sin, *rest[:7]))
    return _joint_outputs(image, text, rest[7])


def _joint_outputs(image: Stream, text: Stream | None, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = joint_shape(image, text, head_dim)
    has_v = image.k is None or image.v is not None
    q = image.q
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(shape if has_v else 0)


@torch.library.custom_op("danceopd::qkv_prep_backward", mutates_args=())
def qkv_prep_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    text_weight_q: Tensor | None,
    text_weight_k: Tensor | None,
    text_cos: Tensor | None,
    text_sin: Tensor | None,
    head_dim: int,
    eps: float,
    text_first: bool,
    weights: bool,
) -> list[Tensor]:
    """Gradients of q, k, v of image and text (a packed one in its first), then of the four norm weights."""
    args = (q, k, v, weight_q, weight_k, cos, sin, text_q, text_k, text_v, text_weight_q, text_weight_k)
    image, text = two_streams((*args, text_cos, text_sin))
    out = _gradients(image, text, head_dim, weights)
    d_image = split_heads(Stream(out[0], *map(none_if_empty, out[1:3])), head_dim)
    d_text = None if text is None else split_heads(Stream(out[3], *map(none_if_empty, out[4:6])), head_dim)
    parts = split_heads(image, head_dim), None if text is None else split_heads(text, head_dim)
    found = run("qkv_prep_backward", q, (grad_q, grad_k, grad_v), *parts, d_image, d_text, eps, text_first, weights)
    _fill(out[6:], [d for pair in found for d in pair])
    return out


def _fill(outputs: list[Tensor], values: Iterable[Tensor]) -> None:
    """Copy each value into its output, in the output's dtype; an empty output is for what has no gradient."""
    for output, value in zip(outputs, values):
        if output.numel():
            output.copy_(value)


@qkv_prep_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Maybe, *args: Any) -> list[Tensor]:
    image, text = two_streams(args[:14])
    return _gradients(image, text, args[14], args[17])


def _gradients(image: Stream, text: Stream | None, head_dim: int, weights: bool) -> list[Tensor]:
    """Places for dq, dk, dv of image and text (a packed one in its first), then of the four norm weights."""
    out = [
        image.q.new_empty(0 if x is None else x.shape)
        for stream in (image, text)
        for x in (stream[:3] if stream else (None,) * 3)
    ]
    for stream in (image, text):
        for weight in (stream.weight_q, stream.weight_k) if stream else (None, None):
            out.append(image.q.new_empty(0) if weight is None or not weights else torch.empty_like(weight))
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:14])
    ctx.head_dim, ctx.eps, _, ctx.text_first = inputs[14:]


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Maybe, ...]:
    args, needs = ctx.saved_tensors, ctx.needs_input_grad
    weights = any(needs[i] for i in (3, 4, 10, 11))
    has_v = args[1] is None or args[2] is not None
    found = qkv_prep_backward(
        grad_q, grad_k, grad_v if has_v else None, *args, ctx.head_dim, ctx.eps, ctx.text_first, weights
    )
    dq, dk, dv, text_dq, text_dk, text_dv, *of_weights = map(none_if_empty, found)
    grads = [dq, dk, dv, *of_weights[:2], None, None, text_dq, text_dk, text_dv, *of_weights[2:], None, None]
    return (*(grad if need else None for grad, need in zip(grads, needs)), *(None,) * 4)


qkv_prep.register_autograd(_backward, setup_context=_setup)


# A parallel block's projection: q, k, v and the SwiGLU behind them


@torch.library.custom_op("danceopd::parallel_prep", mutates_args=())
def parallel_prep(
    packed: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    width: int,
    eps: float,
    round_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v `(B, S, H, D)` and `silu(gate)·up` from the packed projection of a parallel block."""
    out = _parallel_outputs(packed, head_dim, width)
    qkv, gate, up = _unpack(packed, width)
    part = split_heads(Stream(qkv, None, None, weight_q, weight_k, cos, sin), head_dim)
    run("qkv_prep", packed, out[:3], part, None, eps, round_first, True)
    run("swiglu", packed, out[3], gate, up, None)
    return out


@parallel_prep.register_fake
def _(packed: Tensor, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, head_dim: int, width: int, *rest: Any) -> Any:
    return _parallel_outputs(packed, head_dim, width)


def _parallel_outputs(packed: Tensor, head_dim: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, columns = packed.shape
    q, k, v = (packed.new_empty(batch, tokens, width // head_dim, head_dim) for _ in range(3))
    return q, k, v, packed.new_empty(batch, tokens, (columns - 3 * width) // 2)


def _unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = packed[..., 3 * width :].chunk(2, -1)
    return packed[..., : 3 * width], gate, up


@torch.library.custom_op("danceopd::parallel_prep_backward", mutates_args=())
def parallel_prep_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_act: Tensor,
    packed: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    width: int,
    eps: float,
    weights: bool,
) -> list[Tensor]:
    """The gradient of `packed`, then of the two norm weights."""
    d_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    (qkv, gate, up), (d_qkv, d_gate, d_up) = _unpack(packed, width), _unpack(d_packed, width)
    part = split_heads(Stream(qkv, None, None, weight_q, weight_k, cos, sin), head_dim)
    d_part = split_heads(Stream(d_qkv, None, None), head_dim)
    grads = (grad_q, grad_k, grad_v)
    found = run("qkv_prep_backward", packed, grads, part, None, d_part, None, eps, True, weights)
    run("swiglu_backward", packed, d_gate, d_up, grad_act, gate, up)
    outputs = _weight_outputs(packed, weight_q, weight_k, weights)
    _fill(outputs, found[0] if found else ())
    return [d_packed, *outputs]


def _weight_outputs(like: Tensor, weight_q: Maybe, weight_k: Maybe, weights: bool) -> list[Tensor]:
    return [like.new_empty(0) if w is None or not weights else torch.empty_like(w) for w in (weight_q, weight_k)]


@parallel_prep_backward.register_fake
def _(gq: Tensor, gk: Tensor, gv: Tensor, ga: Tensor, packed: Tensor, wq: Maybe, wk: Maybe, *rest: Any) -> Any:
    d_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    return [d_packed, *_weight_outputs(packed, wq, wk, rest[5])]


def _setup_parallel(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.head_dim, ctx.width, ctx.eps, _ = inputs[5:]


def _parallel_backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
    needs = ctx.needs_input_grad
    fixed = ctx.head_dim, ctx.width, ctx.eps, needs[1] or needs[2]
    found = map(none_if_empty, parallel_prep_backward(*grads, *ctx.saved_tensors, *fixed))
    return (*(grad if need else None for grad, need in zip(found, needs)), *(None,) * 6)


parallel_prep.register_autograd(_parallel_backward, setup_context=_setup_parallel)
