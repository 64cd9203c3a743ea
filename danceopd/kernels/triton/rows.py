"""Triton kernels over whole rows of hidden states: `add_norm` and `swiglu`. One program: one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM = {"none": 0, "layer": 1, "rms": 2}


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Batch and token strides; 0 for a dimension of size one, which is broadcast."""
    if x is None:
        return 0, 0
    return (0 if x.shape[0] == 1 else x.stride(0)), (0 if x.shape[1] == 1 else x.stride(1))


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """`x`, or `other` as a pointer that is never read where there is no `x`."""
    return other if x is None else x


def _half(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype != torch.float32


@triton.jit
def _add_norm_forward(x, y, gate, y_weight, weight, scale, shift, total, out,
                  x_batch, x_token, y_batch, y_token, gate_batch, gate_token, scale_batch, scale_token,
                  shift_batch, shift_token, tokens, width, eps, y_eps, BLOCK: tl.constexpr, KIND: tl.constexpr,
                  Y: tl.constexpr, Y_RMS: tl.constexpr, GATE: tl.constexpr, Y_WEIGHT: tl.constexpr,
                  Y_ROUND: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, SCALE: tl.constexpr,
                  SHIFT: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    place = (b * tokens + t) * width + c
    kind = x.dtype.element_ty
    a = tl.load(x + b * x_batch + t * x_token + c, mask=inside, other=0.0).to(tl.float32)
    if Y:
        branch = tl.load(y + b * y_batch + t * y_token + c, mask=inside, other=0.0).to(tl.float32)
        if Y_RMS:
            branch = branch * tl.rsqrt(tl.sum(branch * branch) / width + y_eps)
            if Y_ROUND:
                branch = branch.to(kind).to(tl.float32)
            if Y_WEIGHT:
                branch = branch * tl.load(y_weight + c, mask=inside, other=0.0).to(tl.float32)
            branch = branch.to(kind).to(tl.float32)
        if GATE:
            g = tl.load(gate + b * gate_batch + t * gate_token + c, mask=inside, other=0.0).to(tl.float32)
            branch = (branch * g).to(kind).to(tl.float32)
        rounded = (a + branch).to(kind)
        tl.store(total + place, rounded, mask=inside)
        a = rounded.to(tl.float32)
    if KIND != 0:
        if KIND == 1:
            a = tl.where(inside, a - tl.sum(a) / width, 0.0)
        n = a * tl.rsqrt(tl.sum(a * a) / width + eps)
        if WEIGHT:
            if ROUND:
                n = n.to(kind).to(tl.float32)
            n = n * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            m = tl.load(scale + b * scale_batch + t * scale_token + c, mask=inside, other=0.0).to(tl.float32)
            n = n.to(kind).to(tl.float32) * (1.0 + m).to(kind).to(tl.float32)
        if SHIFT:
            m = tl.load(shift + b * shift_batch + t * shift_token + c, mask=inside, other=0.0).to(tl.float32)
            n = n.to(kind).to(tl.float32) + m
        tl.store(out + place, n.to(kind), mask=inside)


@triton.jit
def _add_norm_backward(total, y, gate, y_weight, weight, scale, grad_total, grad_out, dx, dy,
                   x_batch, x_token, y_batch, y_token, gate_batch, gate_token, scale_batch, scale_token,
                   gt_batch, gt_token, go_batch, go_token, tokens, width, eps, y_eps, BLOCK: tl.constexpr,
                   KIND: tl.constexpr, SUM: tl.constexpr, DY: tl.constexpr, Y_RMS: tl.constexpr,
                   GATE: tl.constexpr, Y_WEIGHT: tl.constexpr, WEIGHT: tl.constexpr,
                   SCALE: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    place = (b * tokens + t) * width + c
    kind = total.dtype.element_ty
    d = tl.zeros([BLOCK], tl.float32)
    if KIND != 0:
        d = tl.load(grad_out + b * go_batch + t * go_token + c, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(total + b * x_batch + t * x_token + c, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            m = tl.load(scale + b * scale_batch + t * scale_token + c, mask=inside, other=0.0).to(tl.float32)
            d = d * (1.0 + m)
        if WEIGHT:
            d = d * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        if KIND == 1:
            a = tl.where(inside, a - tl.sum(a) / width, 0.0)
        r = tl.rsqrt(tl.sum(a * a) / width + eps)
        along = tl.sum(d * a) / width * r * r
        if KIND == 1:
            d = tl.where(inside, d - tl.sum(d) / width, 0.0)
        d = r * (d - a * along)
    if SUM:
        d += tl.load(grad_total + b * gt_batch + t * gt_token + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + place, d.to(kind), mask=inside)
    if DY:
        if GATE:
            d = d * tl.load(gate + b * gate_batch + t * gate_token + c, mask=inside, other=0.0).to(tl.float32)
        if Y_RMS:
            a = tl.load(y + b * y_batch + t * y_token + c, mask=inside, other=0.0).to(tl.float32)
            if Y_WEIGHT:
                d = d * tl.load(y_weight + c, mask=inside, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(a * a) / width + y_eps)
            along = tl.sum(d * a) / width * r * r
            d = r * (d - a * along)
        tl.store(dy + place, d.to(kind), mask=inside)


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
    batch, tokens, width = x.shape
    inputs = [_or(t, x) for t in (y, gate, y_weight, weight, scale, shift, total, out)]
    strides = [stride for t in (x, y, gate, scale, shift) for stride in _strides(t)]
    _add_norm_forward[(tokens, batch)](
        x, *inputs, *strides, tokens, width, eps, y_eps, BLOCK=triton.next_power_of_2(width), KIND=NORM[kind],
        Y=y is not None, Y_RMS=rms_y, GATE=gate is not None, Y_WEIGHT=y_weight is not None, Y_ROUND=_half(y_weight),
        WEIGHT=weight is not None, ROUND=_half(weight), SCALE=scale is not None, SHIFT=shift is not None,
    )  # fmt: skip


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
    batch, tokens, width = total.shape
    grad_total, grad_out = (g if g is None or g.stride(-1) == 1 else g.contiguous() for g in (grad_total, grad_out))
    inputs = [_or(t, total) for t in (y, gate, y_weight, weight, scale, grad_total, grad_out)]
    strides = [stride for t in (total, y, gate, scale, grad_total, grad_out) for stride in _strides(t)]
    _add_norm_backward[(tokens, batch)](
        total, *inputs, dx, _or(dy, dx), *strides, tokens, width, eps, y_eps, BLOCK=triton.next_power_of_2(width),
        KIND=0 if grad_out is None else NORM[kind], SUM=grad_total is not None, DY=dy is not None, Y_RMS=rms_y,
        GATE=gate is not None, Y_WEIGHT=y_weight is not None, WEIGHT=weight is not None, SCALE=scale is not None,
    )  # fmt: skip


# SwiGLU


@triton.jit
def _swiglu_forward(gate, up, passed, out, gate_batch, gate_token, up_batch, up_token, passed_batch, passed_token,
                    out_batch, out_token, width, passed_width, BLOCK: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kind = out.dtype.element_ty
    row = out + b * out_batch + t * out_token
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(passed + b * passed_batch + t * passed_token + c, mask=c < passed_width)
    tl.store(row + c, kept, mask=c < passed_width)
    g = tl.load(gate + b * gate_batch + t * gate_token + c, mask=c < width, other=0.0).to(tl.float32)
    u = tl.load(up + b * up_batch + t * up_token + c, mask=c < width, other=0.0).to(tl.float32)
    g = (g * tl.sigmoid(g)).to(kind).to(tl.float32)
    tl.store(row + passed_width + c, (g * u).to(kind), mask=c < width)


@triton.jit
def _swiglu_backward(grad, gate, up, d_gate, d_up, grad_batch, grad_token, gate_batch, gate_token, up_batch, up_token,
                     dg_batch, dg_token, du_batch, du_token, width, BLOCK: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kind = d_gate.dtype.element_ty
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    d = tl.load(grad + b * grad_batch + t * grad_token + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + b * gate_batch + t * gate_token + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + b * up_batch + t * up_token + c, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    dg = d * u * sigma * (1.0 + g * (1.0 - sigma))
    tl.store(d_gate + b * dg_batch + t * dg_token + c, dg.to(kind), mask=inside)
    tl.store(d_up + b * du_batch + t * du_token + c, (d * g * sigma).to(kind), mask=inside)


BLOCK = 2048


def swiglu(out: Tensor, gate: Tensor, up: Tensor, passed: Tensor | None) -> None:
    """See `reference.swiglu`."""
    width, passed_width = gate.shape[2], 0 if passed is None else passed.shape[2]
    grid = (gate.shape[1], gate.shape[0], triton.cdiv(max(width, passed_width), BLOCK))
    strides = [stride for t in (gate, up, passed, out) for stride in _strides(t)]
    _swiglu_forward[grid](gate, up, _or(passed, gate), out, *strides, width, passed_width, BLOCK=BLOCK)


def swiglu_backward(d_gate: Tensor, d_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """See `reference.swiglu_backward`."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grid = (gate.shape[1], gate.shape[0], triton.cdiv(gate.shape[2], BLOCK))
    strides = [stride for t in (grad, gate, up, d_gate, d_up) for stride in _strides(t)]
    _swiglu_backward[grid](grad, gate, up, d_gate, d_up, *strides, gate.shape[2], BLOCK=BLOCK)
