"""RMSNorm and rotary embedding of one head's rows, in Triton, for `qkv.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from danceopd.kernels.inputs import SplitStream


@triton.jit
def _pairs(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Even and odd columns of a tile."""
    return tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))


@triton.jit
def _turn(x, c, s, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    a, b = _pairs(x, ROWS, COLUMNS)
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, COLUMNS))


@triton.jit
def _factors(cos, sin, at, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin of each pair of columns of a tile; `at`: offsets of its elements in the tables."""
    c, s = _pairs(tl.load(cos + at, mask=inside, other=0.0), ROWS, COLUMNS)
    if not PAIRS:
        s, _ = _pairs(tl.load(sin + at, mask=inside, other=0.0), ROWS, COLUMNS)
    return c, s


@triton.jit
def _prepare(x, w, c, s, eps, kind, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
             ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr):  # fmt: skip
    """Normalise and rotate a tile of rows, rounded where the stock modules store a tensor.

    `w`, `c`, `s` may be one row for all.
    """
    y = x.to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)[:, None]
        if ROUND_FIRST:
            y = y.to(kind).to(tl.float32)
        y = y * w
        if ROTATE:
            y = y.to(kind).to(tl.float32)
    if ROTATE:
        y = _turn(y, c, s, ROWS, COLUMNS)
    return y.to(kind)


def _rope_strides(part: SplitStream) -> tuple[int, int]:
    """Batch and token strides of a stream's rotary tables."""
    if part.cos is None:
        return 0, 0
    return (part.cos.stride(0) if part.cos.ndim == 3 and part.cos.shape[0] > 1 else 0), part.cos.stride(-2)
