"""Triton kernel of `prepared_attention`: `attention.py` with norm and rotation of both streams in its prologue."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from danceopd.kernels.inputs import SplitStream, stream_offsets
from danceopd.kernels.triton.attention import BM, BN, _over, _step, stages
from danceopd.kernels.triton.heads import _factors, _prepare, _rope_strides
from danceopd.kernels.triton.rows import _or, _strides


@triton.jit
def _rows(image, text, image_token, text_token, place, there, of_text, first, text_first, d, D: tl.constexpr,
          TEXT: tl.constexpr):  # fmt: skip
    """Rows of one head at positions `place` of the joint sequence, from image or text; zeros unless `there`."""
    inside = there[:, None] & (d < D)[None, :]
    if not TEXT:
        return tl.load(image + place[:, None] * image_token + d[None, :], mask=inside, other=0.0)
    at = (place - first)[:, None] * image_token + d[None, :]
    x = tl.load(image + at, mask=inside & (of_text == 0)[:, None], other=0.0)
    at = (place - text_first)[:, None] * text_token + d[None, :]
    y = tl.load(text + at, mask=inside & of_text[:, None], other=0.0)
    return tl.where(of_text[:, None], y, x)


@triton.jit
def _prepared(x, weight, text_weight, cos, sin, text_cos, text_sin, rope_token, text_rope_token, place, there, of_text,
              first, text_first, d, eps, kind, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
              TEXT: tl.constexpr, NORM: tl.constexpr, ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr,
              PAIRS: tl.constexpr):  # fmt: skip
    """The rows `x`, normalised and rotated with the weights and tables of their streams."""
    w, c, s = 0.0, 0.0, 0.0
    inside = there[:, None] & (d < D)[None, :]
    if NORM:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if TEXT:
            w = tl.where(of_text[:, None], tl.load(text_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :], w)
    if ROTATE:
        at = (place - first)[:, None] * rope_token + d[None, :]
        if TEXT:
            c, s = _factors(cos, sin, at, inside & (of_text == 0)[:, None], ROWS, BD, PAIRS)
            at = (place - text_first)[:, None] * text_rope_token + d[None, :]
            text_c, text_s = _factors(text_cos, text_sin, at, inside & of_text[:, None], ROWS, BD, PAIRS)
            c, s = tl.where(of_text[:, None], text_c, c), tl.where(of_text[:, None], text_s, s)
        else:
            c, s = _factors(cos, sin, at, inside, ROWS, BD, PAIRS)
    return _prepare(x, w, c, s, eps, kind, D, ROWS, BD, NORM, ROUND_FIRST, ROTATE)


@triton.jit
def _attend_prepared(q, k, v, weight_q, weight_k, cos, sin, text_q, text_k, text_v, text_weight_q, text_weight_k,
                     text_cos, text_sin, source_k, source_v, out, cu_seqlens, tokens,
                     q_batch, q_token, k_batch, k_token, v_batch, v_token, rope_batch, rope_token,
                     text_q_batch, text_q_token, text_k_batch, text_k_token, text_v_batch, text_v_token,
                     text_rope_batch, text_rope_token, source_k_batch, source_k_token, source_v_batch, source_v_token,
                     out_batch, out_token, heads, length, first, text_first, texts, source, scale, eps,
                     RAGGED: tl.constexpr, LISTED: tl.constexpr, SOURCE: tl.constexpr, TEXT: tl.constexpr,
                     NORM: tl.constexpr, ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
                     D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    begin, own = 0, length
    if RAGGED:
        begin = tl.load(cu_seqlens + sample)
        own = tl.load(cu_seqlens + sample + 1) - begin
    list_at = begin
    if LISTED:
        begin = begin * 0
    m, d, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD), head * D
    cos, text_cos = cos + sample * rope_batch, text_cos + sample * text_rope_batch
    sin, text_sin = sin + sample * rope_batch, text_sin + sample * text_rope_batch
    there = m < own
    place = m + begin
    if LISTED:
        place = tl.load(tokens + list_at + m, mask=there, other=0)
    place = place.to(tl.int64)
    of_text = (place >= text_first) & (place < text_first + texts)
    queries = _rows(q + sample * q_batch + column, text_q + sample * text_q_batch + column, q_token, text_q_token,
                    place, there, of_text, first, text_first, d, D, TEXT)  # fmt: skip
    queries = _prepared(queries, weight_q, text_weight_q, cos, sin, text_cos, text_sin, rope_token, text_rope_token,
                        place, there, of_text, first, text_first, d, eps, q.dtype.element_ty, D, BD, BM, TEXT, NORM,
                        ROUND_FIRST, ROTATE, PAIRS)  # fmt: skip
    to = out + sample * out_batch + column + place[:, None] * out_token + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, BD], tl.float32)
    own = tl.where(tl.program_id(0) * BM < own, own, 0)  # a program without queries reads no keys
    for start in range(0, own, BN):
        n = start + tl.arange(0, BN)
        there = n < own
        place = n + begin
        if LISTED:
            place = tl.load(tokens + list_at + n, mask=there, other=0)
        place = place.to(tl.int64)
        of_text = (place >= text_first) & (place < text_first + texts)
        key = _rows(k + sample * k_batch + column, text_k + sample * text_k_batch + column, k_token, text_k_token,
                    place, there, of_text, first, text_first, d, D, TEXT)  # fmt: skip
        key = _prepared(key, weight_k, text_weight_k, cos, sin, text_cos, text_sin, rope_token, text_rope_token, place,
                        there, of_text, first, text_first, d, eps, q.dtype.element_ty, D, BD, BN, TEXT, NORM,
                        ROUND_FIRST, ROTATE, PAIRS)  # fmt: skip
        value = _rows(v + sample * v_batch + column, text_v + sample * text_v_batch + column, v_token, text_v_token,
                      place, there, of_text, first, text_first, d, D, TEXT)  # fmt: skip
        top, total, found = _step(queries, key, value, there, top, total, found, scale)
    if SOURCE:
        top, total, found = _over(queries, source_k + sample * source_k_batch + column,
                                  source_v + sample * source_v_batch + column, source_k_token, source_v_token,
                                  tokens, source, top, total, found, scale, False, D, BD, BN)  # fmt: skip
    tl.store(to, (found / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prepared_attention(
    out: Tensor,
    image: SplitStream,
    text: SplitStream | None,
    cu_seqlens: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    max_seqlen: int,
    eps: float,
    round_first: bool,
    text_first: bool,
    scale: float,
) -> None:
    """See `reference.prepared_attention`; `out` is dense, and both streams have the same kinds of norm and table."""
    batch, length, heads, head_dim = out.shape
    samples = batch if cu_seqlens is None else len(cu_seqlens) - 1
    other = image if text is None else text
    parts = [_or(x, image.q) for part in (image, other) for x in part]
    strides = [n for part in (image, other) for at in (*map(_strides, part[:3]), _rope_strides(part)) for n in at]
    strides += [n for x in (source_k, source_v, out) for n in _strides(x)]
    wide = image.weight_q is not None and image.weight_q.dtype == torch.float32
    _attend_prepared[(triton.cdiv(max_seqlen, BM), samples * heads)](
        *parts, _or(source_k, image.q), _or(source_v, image.q), out, _or(cu_seqlens, out), _or(tokens, out), *strides,
        heads, length, *stream_offsets(image, text, text_first), 0 if text is None else text.q.shape[1],
        0 if source_k is None else source_k.shape[1], scale * math.log2(math.e), eps,
        RAGGED=cu_seqlens is not None, LISTED=tokens is not None, SOURCE=source_k is not None, TEXT=text is not None,
        NORM=image.weight_q is not None, ROUND_FIRST=round_first and not wide, ROTATE=image.cos is not None,
        PAIRS=image.sin is None, D=head_dim, BD=triton.next_power_of_2(head_dim), BM=BM, BN=BN,
        num_stages=stages(out, prologue=True),
    )  # fmt: skip
