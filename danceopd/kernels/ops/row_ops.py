"""The operators over whole rows of hidden states: `danceopd::add_norm` and `danceopd::swiglu`.

Same rules as in `attention_ops.py`. The gradients of scale, shift and gate, which nobody trains under LoRA, are plain
torch and computed only where something needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danceopd.kernels import reference
from danceopd.kernels.ops.dispatch import Maybe, none_if_empty, run


@torch.library.custom_op("danceopd::add_norm", mutates_args=())
def add_norm(
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
) -> tuple[Tensor, Tensor]:
    """See `functional.add_norm`: the sum (empty without `y`) and its norm (empty for `kind` "none")."""
    total, out = _add_norm_outputs(x, y, kind)
    fixed = kind, rms_y, eps, y_eps
    run("add_norm", x, none_if_empty(total), none_if_empty(out), x, y, gate, y_weight, weight, scale, shift, *fixed)
    return total, out


@add_norm.register_fake
def _(x: Tensor, y: Maybe, gate: Maybe, yw: Maybe, w: Maybe, scale: Maybe, shift: Maybe, kind: str, *rest: Any) -> Any:
    return _add_norm_outputs(x, y, kind)


def _add_norm_outputs(x: Tensor, y: Maybe, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if y is None else x.shape), x.new_empty(0 if kind == "none" else x.shape)


@torch.library.custom_op("danceopd::add_norm_backward", mutates_args=())
def add_norm_backward(
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
    with_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `y`; `total` is the saved sum, `y` the branch where it is normalised."""
    dx, dy = total.new_empty(total.shape), total.new_empty(total.shape if with_y else 0)
    saved = grad_total, grad_out, total, y, gate, y_weight, weight, scale
    run("add_norm_backward", total, dx, none_if_empty(dy), *saved, kind, rms_y, eps, y_eps)
    return dx, dy


@add_norm_backward.register_fake
def _(grad_total: Maybe, grad_out: Maybe, total: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), total.new_empty(total.shape if rest[-1] else 0)


def _setup_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, y_weight, weight, scale, _, *ctx.fixed = inputs
    needs = ctx.needs_input_grad
    keeps_y = inputs[8] or needs[2]  # the branch itself: through its norm, or for its gate
    ctx.save_for_backward(output[0] if y is not None else x, y if keeps_y else None, gate, y_weight, weight, scale)
    ctx.with_y, ctx.shift = y is not None, None if inputs[6] is None else inputs[6].shape


def _add_norm_backward(ctx: Any, grad_total: Tensor, grad_out: Tensor) -> tuple[Maybe, ...]:
    total, y, gate, y_weight, weight, scale = ctx.saved_tensors
    kind, rms_y, eps, y_eps = ctx.fixed
    needs = ctx.needs_input_grad
    grads = (grad_total if ctx.with_y else None), (None if kind == "none" else grad_out)
    dx, dy = add_norm_backward(
        *grads, total, y if rms_y else None, gate, y_weight, weight, scale, kind, rms_y, eps, y_eps, ctx.with_y
    )
    found: list[Maybe] = [dx, none_if_empty(dy), None, None, None, None, None]
    if any(needs[2:7]):
        found[2:] = _modulation_gradients(ctx, dx, grad_out, total, y, gate, y_weight, weight, scale)
    return (*(grad if need else None for grad, need in zip(found, needs)), None, None, None, None)


def _modulation_gradients(
    ctx: Any,
    dx: Tensor,
    grad_out: Tensor,
    total: Tensor,
    y: Maybe,
    gate: Maybe,
    y_weight: Maybe,
    weight: Maybe,
    scale: Maybe,
) -> list[Maybe]:
    """Gradients of gate, y_weight, weight, scale and shift, by autograd through the reference."""
    kind, rms_y, eps, y_eps = ctx.fixed
    found: list[Maybe] = [None] * 5
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (gate, y_weight, weight, scale)]
        if y is not None and (gate is not None or y_weight is not None):
            branch = reference.added(torch.zeros_like(total), y, leaves[0], rms_y, leaves[1], y_eps)
            _collect(found, (0, 1), leaves[:2], branch, dx)
        if kind != "none":
            out = reference.normed(total.detach(), kind, leaves[2], leaves[3], None, eps)
            _collect(found, (2, 3), leaves[2:], out, grad_out)
            if ctx.shift is not None:
                found[4] = grad_out.sum_to_size(ctx.shift)
    return found


def _collect(found: list[Maybe], places: tuple[int, int], leaves: list[Maybe], out: Tensor, grad: Tensor) -> None:
    wanted = [(place, leaf) for place, leaf in zip(places, leaves) if leaf is not None]
    if wanted:
        grads = torch.autograd.grad(out, [leaf for _, leaf in wanted], grad)
        for (place, _), value in zip(wanted, grads):
            found[place] = value


add_norm.register_autograd(_add_norm_backward, setup_context=_setup_add_norm)


@torch.library.custom_op("danceopd::swiglu", mutates_args=())
def swiglu(x: Tensor, up: Tensor | None, passed: Tensor | None) -> Tensor:
    """See `functional.swiglu_concat`."""
    gate, other = _halves(x, up)
    out = _swiglu_output(x, up, passed)
    run("swiglu", x, out, gate, other, passed)
    return out


@swiglu.register_fake
def _(x: Tensor, up: Maybe, passed: Maybe) -> Tensor:
    return _swiglu_output(x, up, passed)


def _swiglu_output(x: Tensor, up: Maybe, passed: Maybe) -> Tensor:
    columns = x.shape[-1] // (2 if up is None else 1) + (0 if passed is None else passed.shape[-1])
    return x.new_empty(*x.shape[:-1], columns)


def _halves(x: Tensor, up: Maybe) -> tuple[Tensor, Tensor]:
    """Gate and up: `x` holds both, or `up` is apart."""
    gate, other = x.chunk(2, -1) if up is None else (x, up)
    return gate, other


@torch.library.custom_op("danceopd::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `up`."""
    dx, d_up = x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape)
    run("swiglu_backward", x, *_halves(dx, none_if_empty(d_up)), grad, *_halves(x, up))
    return dx, d_up


@swiglu_backward.register_fake
def _(grad: Tensor, x: Tensor, up: Maybe) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape)


def _setup_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.passed = 0 if inputs[2] is None else inputs[2].shape[-1]


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Maybe, Maybe, Maybe]:
    d_passed, grad = (grad[..., : ctx.passed], grad[..., ctx.passed :]) if ctx.passed else (None, grad)
    dx, d_up = swiglu_backward(grad, *ctx.saved_tensors)
    return dx, none_if_empty(d_up), d_passed


swiglu.register_autograd(_swiglu_backward, setup_context=_setup_swiglu)
