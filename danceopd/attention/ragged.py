"""`danceopd::ragged_attention`: our own attention forward, for ragged rows and for keys and values from a cache.

A custom operator like those of `ops.py`, with shapes for tracing and no gradient: rollouts have none. It is one of
the cores that `core.py` measures, and never for dense rows, which the libraries serve better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import Maybe, _run


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
