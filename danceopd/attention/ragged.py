"""`danceopd::ragged_attention`: our own attention forward, for ragged rows and for keys and values from a cache.

A custom operator like those of `ops.py`, with shapes for tracing and no gradient: rollouts have none. It is one of
the cores that `core.py` measures, and never for dense rows, which the libraries serve better.
`danceopd::prepared_attention` is the same on projections, norm and rotation included; `prologue.py` says when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import Maybe, _run, _streams
from .parts import Stream, heads, heads_apart


@torch.library.custom_op("danceopd::ragged_attention", mutates_args=())
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cumulative: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    longest: int,
    scale: float,
) -> Tensor:
    """See `reference.ragged_attention`: `(B, S, H, D)`, dense; zeros at tokens that a list leaves out.

    `cumulative`, `tokens`: int32. `longest`: no less than the tokens of the longest sample.
    """
    out = q.new_empty(q.shape) if tokens is None else q.new_zeros(q.shape)
    _run("ragged_attention", q, out, q, k, v, cumulative, tokens, source_k, source_v, longest, scale)
    return out


@ragged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cumulative: Maybe, tokens: Maybe, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("danceopd::prepared_attention", mutates_args=())
def prepared_attention(
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
    cumulative: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    longest: int,
    head_dim: int,
    eps: float,
    round_first: bool,
    text_first: bool,
    scale: float,
) -> Tensor:
    """See `reference.prepared_attention`: `(B, S, H, D)`, dense; zeros at tokens that a list leaves out.

    The first fourteen are the fields of two `Stream`s, image and text; the others as `ragged_attention` has them.
    """
    args = (q, k, v, weight_q, weight_k, cos, sin, text_q, text_k, text_v, text_weight_q, text_weight_k)
    image, text = _streams((*args, text_cos, text_sin))
    shape = _joint_shape(image, text, head_dim)
    out = q.new_empty(shape) if tokens is None else q.new_zeros(shape)
    parts = heads_apart(image, head_dim), None if text is None else heads_apart(text, head_dim)
    lists = cumulative, tokens, source_k, source_v, longest
    _run("prepared_attention", q, out, *parts, *lists, eps, round_first, text_first, scale)
    return out


@prepared_attention.register_fake
def _(q: Tensor, k: Maybe, v: Maybe, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, *rest: Any) -> Tensor:
    image, text = _streams((q, k, v, wq, wk, cos, sin, *rest[:7]))
    return q.new_empty(_joint_shape(image, text, rest[12]))


def _joint_shape(image: Stream, text: Stream | None, head_dim: int) -> tuple[int, int, int, int]:
    tokens = image.q.shape[1] + (0 if text is None else text.q.shape[1])
    return image.q.shape[0], tokens, heads(image, head_dim), head_dim
