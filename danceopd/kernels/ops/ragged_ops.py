"""The attention operators: `danceopd::ragged_attention` and `danceopd::prepared_attention`. Forward only.

For rows with padding inside and for keys and values from a cache; rollouts, which need no gradient, call them.
`ragged_attention` is the attention backend `ours` that `attention.py` measures, never for dense rows, which libraries
do better. `prepared_attention` is the same on projections, norm and rotation included; `prologue.py` says when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danceopd.kernels.inputs import joint_shape, split_heads
from danceopd.kernels.ops.dispatch import Maybe, run, two_streams


@torch.library.custom_op("danceopd::ragged_attention", mutates_args=())
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """See `reference.ragged_attention`: `(B, S, H, D)`, dense; zeros at tokens that the list `tokens` leaves out.

    `cu_seqlens`, `tokens`: int32. `max_seqlen`: at least the tokens of the longest sample.
    """
    out = q.new_empty(q.shape) if tokens is None else q.new_zeros(q.shape)
    run("ragged_attention", q, out, q, k, v, cu_seqlens, tokens, source_k, source_v, max_seqlen, scale)
    return out


@ragged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Maybe, tokens: Maybe, *rest: Any) -> Tensor:
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
    cu_seqlens: Tensor | None,
    tokens: Tensor | None,
    source_k: Tensor | None,
    source_v: Tensor | None,
    max_seqlen: int,
    head_dim: int,
    eps: float,
    round_first: bool,
    text_first: bool,
    scale: float,
) -> Tensor:
    """See `reference.prepared_attention`: `(B, S, H, D)`, dense; zeros at tokens that the list `tokens` leaves out.

    The first fourteen arguments are the fields of two `Stream`s, image and text; the others as in `ragged_attention`.
    """
    args = (q, k, v, weight_q, weight_k, cos, sin, text_q, text_k, text_v, text_weight_q, text_weight_k)
    image, text = two_streams((*args, text_cos, text_sin))
    shape = joint_shape(image, text, head_dim)
    out = q.new_empty(shape) if tokens is None else q.new_zeros(shape)
    parts = split_heads(image, head_dim), None if text is None else split_heads(text, head_dim)
    lists = cu_seqlens, tokens, source_k, source_v, max_seqlen
    run("prepared_attention", q, out, *parts, *lists, eps, round_first, text_first, scale)
    return out


@prepared_attention.register_fake
def _(q: Tensor, k: Maybe, v: Maybe, wq: Maybe, wk: Maybe, cos: Maybe, sin: Maybe, *rest: Any) -> Tensor:
    image, text = two_streams((q, k, v, wq, wk, cos, sin, *rest[:7]))
    return q.new_empty(joint_shape(image, text, rest[12]))
