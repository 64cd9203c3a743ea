"""Triton kernels of `qkv_prep` and its gradient: RMSNorm, rotary embedding and joining of q, k and v.

The Triton implementation runs on the same GPUs as `cuda/` and is the one whose arithmetic a CPU can check
(`TRITON_INTERPRET=1`). The functions are those of `cuda/launch.py`. Here one program handles one token, all heads in
one tile, one launch for each stream. Rows are loaded whole and pairs of columns taken apart in registers, because
loads with a stride of two would move 2 bytes each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from danceopd.kernels.inputs import SplitStream, stream_offsets
from danceopd.kernels.triton.heads import _factors, _prepare, _rope_strides, _turn
from danceopd.kernels.triton.rows import _strides


@triton.jit
def _qkv_forward(q, k, v, weight_q, weight_k, cos, sin, out_q, out_k, out_v,
                 q_batch, q_token, k_batch, k_token, v_batch, v_token, rope_batch, rope_token,
                 first, total, heads, eps, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                 NORM: tl.constexpr, ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
                 HAS_V: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, BH), tl.arange(0, BD)
    inside = (h < heads)[:, None] & (d < D)[None, :]
    tile = h[:, None] * D + d[None, :]
    out = (b * total + first + t) * heads * D + tile
    wq, wk, c, s = 0.0, 0.0, 0.0, 0.0
    if NORM:
        wq = tl.load(weight_q + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        wk = tl.load(weight_k + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        at = b * rope_batch + t * rope_token + d[None, :]
        c, s = _factors(cos, sin, at, (d < D)[None, :], 1, BD, PAIRS)
    x = tl.load(q + b * q_batch + t * q_token + tile, mask=inside, other=0.0)
    y = _prepare(x, wq, c, s, eps, q.dtype.element_ty, D, BH, BD, NORM, ROUND_FIRST, ROTATE)
    tl.store(out_q + out, y, mask=inside)
    x = tl.load(k + b * k_batch + t * k_token + tile, mask=inside, other=0.0)
    y = _prepare(x, wk, c, s, eps, q.dtype.element_ty, D, BH, BD, NORM, ROUND_FIRST, ROTATE)
    tl.store(out_k + out, y, mask=inside)
    if HAS_V:
        tl.store(out_v + out, tl.load(v + b * v_batch + t * v_token + tile, mask=inside), mask=inside)


@triton.jit
def _retrace(x, grad, w, c, s, eps, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr,
             ROTATE: tl.constexpr):  # fmt: skip
    u = grad.to(tl.float32)
    if ROTATE:
        u = _turn(u, c, -s, BH, BD)
    dw = tl.sum(u, axis=0)
    if NORM:
        x = x.to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        dw = tl.sum(u * x * r, axis=0)
        u = u * w[None, :]
        along = (tl.sum(u * x, axis=1) / D)[:, None] * r * r
        u = r * (u - x * along)
    return u, dw


@triton.jit
def _qkv_backward(grad_q, grad_k, grad_v, q, k, weight_q, weight_k, cos, sin, dq, dk, dv, partial,
                  gq_batch, gq_token, gq_head, gk_batch, gk_token, gk_head, gv_batch, gv_token, gv_head,
                  q_batch, q_token, k_batch, k_token, rope_batch, rope_token,
                  dq_batch, dq_token, dk_batch, dk_token, dv_batch, dv_token,
                  first, tokens, heads, eps, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                  NORM: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr, HAS_V: tl.constexpr,
                  WEIGHTS: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, BH), tl.arange(0, BD)
    inside = (h < heads)[:, None] & (d < D)[None, :]
    tile = h[:, None] * D + d[None, :]
    kind = dq.dtype.element_ty
    wq, wk, c, s = 0.0, 0.0, 0.0, 0.0
    if NORM:
        wq = tl.load(weight_q + d, mask=d < D, other=0.0).to(tl.float32)
        wk = tl.load(weight_k + d, mask=d < D, other=0.0).to(tl.float32)
    if ROTATE:
        at = b * rope_batch + t * rope_token + d[None, :]
        c, s = _factors(cos, sin, at, (d < D)[None, :], 1, BD, PAIRS)
    row = partial + (b * tokens + t) * 2 * D + d
    x = tl.load(q + b * q_batch + t * q_token + tile, mask=inside, other=0.0)
    at = b * gq_batch + (first + t) * gq_token + h[:, None] * gq_head + d[None, :]
    u, dw = _retrace(x, tl.load(grad_q + at, mask=inside, other=0.0), wq, c, s, eps, D, BH, BD, NORM, ROTATE)
    tl.store(dq + b * dq_batch + t * dq_token + tile, u.to(kind), mask=inside)
    if WEIGHTS:
        tl.store(row, dw, mask=d < D)
    x = tl.load(k + b * k_batch + t * k_token + tile, mask=inside, other=0.0)
    at = b * gk_batch + (first + t) * gk_token + h[:, None] * gk_head + d[None, :]
    u, dw = _retrace(x, tl.load(grad_k + at, mask=inside, other=0.0), wk, c, s, eps, D, BH, BD, NORM, ROTATE)
    tl.store(dk + b * dk_batch + t * dk_token + tile, u.to(kind), mask=inside)
    if WEIGHTS:
        tl.store(row + D, dw, mask=d < D)
    if HAS_V:
        at = b * gv_batch + (first + t) * gv_token + h[:, None] * gv_head + d[None, :]
        tl.store(dv + b * dv_batch + t * dv_token + tile, tl.load(grad_v + at, mask=inside), mask=inside)


def _blocks(part: SplitStream) -> dict[str, int]:
    heads, head_dim = part.q.shape[2:]
    return {"D": head_dim, "BH": triton.next_power_of_2(heads), "BD": triton.next_power_of_2(head_dim)}


def _pointers(part: SplitStream) -> list[Tensor]:
    """Weights and tables; q as a pointer that is never read where there is none."""
    return [part.q if x is None else x for x in (part.weight_q, part.weight_k, part.cos, part.sin)]


def _with_offsets(
    image: SplitStream, text: SplitStream | None, text_first: bool
) -> list[tuple[SplitStream, int]]:
    """The streams and where each begins in the joint sequence, image first."""
    streams = [image] if text is None else [image, text]
    return list(zip(streams, stream_offsets(image, text, text_first)))


def qkv_prep(
    out: tuple[Tensor, Tensor, Tensor | None],
    image: SplitStream,
    text: SplitStream | None,
    eps: float,
    round_first: bool,
    text_first: bool,
) -> None:
    """See `reference.qkv_prep`; `out` is dense."""
    for part, first in _with_offsets(image, text, text_first):
        batch, tokens, heads, _ = part.q.shape
        v = part.q if part.v is None else part.v
        wide = part.weight_q is not None and part.weight_q.dtype == torch.float32
        _qkv_forward[(tokens, batch)](
            part.q, part.k, v, *_pointers(part), out[0], out[1], out[0] if out[2] is None else out[2],
            *_strides(part.q), *_strides(part.k), *_strides(v), *_rope_strides(part), first, out[0].shape[1],
            heads, eps, **_blocks(part), NORM=part.weight_q is not None, ROUND_FIRST=round_first and not wide,
            ROTATE=part.cos is not None, PAIRS=part.sin is None, HAS_V=part.v is not None,
        )  # fmt: skip


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
    found = []
    grad_q, grad_k = (g if g.stride(-1) == 1 else g.contiguous() for g in grads[:2])
    grad_v = grad_q if grads[2] is None else grads[2]
    grad_v = grad_v if grad_v.stride(-1) == 1 else grad_v.contiguous()
    for (part, first), d in zip(_with_offsets(image, text, text_first), (d_image, d_text)):
        assert d is not None
        batch, tokens, heads, head_dim = part.q.shape
        partial = part.q.new_empty(batch * tokens if weights else 0, 2, head_dim, dtype=torch.float32)
        dv = d.q if d.v is None else d.v
        strides = [stride for g in (grad_q, grad_k, grad_v) for stride in g.stride()[:3]]
        _qkv_backward[(tokens, batch)](
            grad_q, grad_k, grad_v, part.q, part.k, *_pointers(part), d.q, d.k, dv, partial, *strides,
            *_strides(part.q), *_strides(part.k), *_rope_strides(part), *_strides(d.q), *_strides(d.k), *_strides(dv),
            first, tokens, heads, eps,
            **_blocks(part), NORM=part.weight_q is not None, ROTATE=part.cos is not None, PAIRS=part.sin is None,
            HAS_V=d.v is not None and grads[2] is not None, WEIGHTS=weights,
        )  # fmt: skip
        total = partial.sum(0)
        found.append((total[0], total[1]))
    return found if weights else []
