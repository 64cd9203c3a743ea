"""Triton kernel of `ragged_attention`: rows with padding, and cached keys. One program: 64 queries of one head."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from danceopd.kernels.triton.rows import _or, _strides


@triton.jit
def _step(q, key, value, there, top, total, out, scale):
    """Online softmax, one tile of keys further."""
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(there[None, :], scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, axis=1))
    shrink = tl.exp2(top - now)
    p = tl.exp2(scores - now[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    out = out * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return now, total, out


@triton.jit
def _over(q, k, v, k_token, v_token, tokens, count, top, total, out, scale, LISTED: tl.constexpr, D: tl.constexpr,
          BD: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Online softmax over `count` keys that start at `k` and `v`."""
    d = tl.arange(0, BD)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        there = n < count
        place = n
        if LISTED:
            place = tl.load(tokens + n, mask=there, other=0)
        place = place.to(tl.int64)
        inside = there[:, None] & (d < D)[None, :]
        key = tl.load(k + place[:, None] * k_token + d[None, :], mask=inside, other=0.0)
        value = tl.load(v + place[:, None] * v_token + d[None, :], mask=inside, other=0.0)
        top, total, out = _step(q, key, value, there, top, total, out, scale)
    return top, total, out


@triton.jit
def _attend(q, k, v, source_k, source_v, out, cu_seqlens, tokens,
            q_batch, q_token, k_batch, k_token, v_batch, v_token, source_k_batch, source_k_token,
            source_v_batch, source_v_token, out_batch, out_token, heads, length, source, scale,
            RAGGED: tl.constexpr, LISTED: tl.constexpr, SOURCE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    begin, own = 0, length
    if RAGGED:
        begin = tl.load(cu_seqlens + sample)
        own = tl.load(cu_seqlens + sample + 1) - begin
    list_at = begin
    if LISTED:
        begin = begin * 0
    begin = tl.cast(begin, tl.int64)  # where a packed row's stretch begins; its batch stride is 0
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    place = m
    if LISTED:
        place = tl.load(tokens + list_at + m, mask=m < own, other=0)
    place = place.to(tl.int64)
    inside = (m < own)[:, None] & (d < D)[None, :]
    column = head * D
    queries = tl.load(q + sample * q_batch + begin * q_token + column + place[:, None] * q_token + d[None, :],
                      mask=inside, other=0.0)  # fmt: skip
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, BD], tl.float32)
    own = tl.where(tl.program_id(0) * BM < own, own, 0)  # a program without queries reads no keys
    top, total, found = _over(queries, k + sample * k_batch + begin * k_token + column,
                              v + sample * v_batch + begin * v_token + column, k_token, v_token, tokens + list_at, own,
                              top, total, found, scale, LISTED, D, BD, BN)  # fmt: skip
    if SOURCE:
        top, total, found = _over(queries, source_k + sample * source_k_batch + column,
                                  source_v + sample * source_v_batch + column, source_k_token, source_v_token,
                                  tokens, source, top, total, found, scale, False, D, BD, BN)  # fmt: skip
    to = out + sample * out_batch + begin * out_token + column + place[:, None] * out_token + d[None, :]
    tl.store(to, (found / total[:, None]).to(out.dtype.element_ty), mask=inside)


BM, BN = 64, 64


def stages(like: Tensor, prologue: bool = False) -> int:
    """`num_stages`: tiles of keys loaded ahead, as many as fit 99 KB of shared memory (sm_89, sm_120)."""
    return 1 if prologue or like.element_size() == 4 else 2


def ragged_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    max_seqlen: int,
    scale: float,
) -> None:
    """See `reference.ragged_attention`; `out` is dense."""
    batch, length, heads, head_dim = q.shape
    samples = batch if cu_seqlens is None else len(cu_seqlens) - 1
    strides = [stride for t in (q, k, v, source_k, source_v, out) for stride in _strides(t)]
    _attend[(triton.cdiv(max_seqlen, BM), samples * heads)](
        q, k, v, _or(source_k, k), _or(source_v, v), out, _or(cu_seqlens, q), _or(tokens, q), *strides,
        heads, length, 0 if source_k is None else source_k.shape[1], scale * math.log2(math.e),
        RAGGED=cu_seqlens is not None, LISTED=tokens is not None, SOURCE=source_k is not None, D=head_dim,
        BD=triton.next_power_of_2(head_dim), BM=BM, BN=BN, num_stages=stages(q),
    )  # fmt: skip
