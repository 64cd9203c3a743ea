"""Attention of projections: norm and rotation in a pass of their own, or inside the attention kernel (its prologue).

`danceopd::prepared_attention` normalises and rotates q and k as it loads them. That saves a pass over q, k and v, but
every block of 64 queries prepares all keys again, which takes about as long as multiplying with them. So
`worth_fusing` allows it only where `ragged_attention` is the attention backend anyway, never for dense rows, and only
up to `MAX_BLOCKS` blocks of queries. All other calls, and those that need a gradient, run `joint_qkv` first. See
docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danceopd.kernels import backend
from danceopd.kernels.attention import attend, known_backend, simplified
from danceopd.kernels.attention_backends import AttentionCall, CachedKV
from danceopd.kernels.functional import heads_unsupported, joint_qkv
from danceopd.kernels.inputs import Stream, joint_shape, split_heads
from danceopd.kernels.ops.ragged_ops import prepared_attention

QUERY_BLOCK = 64
"""Queries in one block of the kernel."""
MAX_BLOCKS = 2
"""Blocks of queries in the longest row up to which preparing the keys in each block is cheaper than a pass before."""


def joint_attention(
    image: Stream,
    text: Stream | None = None,
    mask: Tensor | None = None,
    source: CachedKV | None = None,
    *,
    head_dim: int,
    eps: float,
    round_first: bool = False,
    text_first: bool = True,
    prologue: bool | None = None,
) -> Tensor:
    """`attend(*joint_qkv(image, text), mask, source)`: `(B, S, H, D)`. See both for the arguments.

    `prologue`: norm and rotation inside the attention kernel if `worth_fusing` (None), wherever the kernel can run
    (True), or never (False); the values are the same, both ways round at the same places. The keys of a source are
    normalised and rotated already.
    """
    dense = mask is None and source is None
    if prologue or (prologue is None and not dense):
        call = _call(image, text, mask, source, head_dim)
        if (prologue or worth_fusing(call)) and (call.mask is None or call.unpadded is not None):
            problem = _unsupported(image, text, source, head_dim)
            if not problem:
                lists = (None, None) if call.unpadded is None else (call.unpadded.cu_seqlens, call.unpadded.tokens)
                cached = (None, None) if source is None else (source.k, source.v)
                fixed = head_dim, eps, round_first, text_first, head_dim**-0.5
                rest = (None,) * 7 if text is None else text
                return prepared_attention(*image, *rest, *lists, *cached, _max_seqlen(call), *fixed)
            if backend.active(image.q.device.type) != "torch":
                backend.warn_once(f"q and k are prepared in a separate pass before attention: {problem}")
    q, k, v = joint_qkv(image, text, head_dim=head_dim, eps=eps, round_first=round_first, text_first=text_first)
    return attend(q, k, v, mask, source)


def worth_fusing(call: AttentionCall) -> bool:
    """Whether the prologue saves time: `ours` is the attention backend for this shape, and there are few queries."""
    if call.unpadded is None and (call.mask is not None or call.source is None):
        return False
    return _max_seqlen(call) <= MAX_BLOCKS * QUERY_BLOCK and known_backend(call) == "ours"


def _max_seqlen(call: AttentionCall) -> int:
    return call.q.shape[1] if call.unpadded is None else call.unpadded.max_seqlen


def _call(
    image: Stream, text: Stream | None, mask: Tensor | None, source: CachedKV | None, head_dim: int
) -> AttentionCall:
    """The call that `attend` would get; q, k and v have their shapes and no memory."""
    like = image.q.detach().new_empty(()).expand(joint_shape(image, text, head_dim))
    return simplified(AttentionCall(like, like, like, mask, None, source))


def _unsupported(image: Stream, text: Stream | None, source: CachedKV | None, head_dim: int) -> str:
    """Why the prologue cannot run, "" if it can."""
    streams = [image] if text is None else [image, text]
    cached = [] if source is None else [source.k, source.v]
    given = [x for stream in streams for x in stream if x is not None] + cached
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "the prologue has no gradient"
    if any(stream.k is not None and stream.v is None for stream in streams):
        return "the values are not given with q and k"
    if len({tuple(None if x is None else x.dtype for x in stream[3:]) for stream in streams}) > 1:
        return "text and image differ in norm or rotary table"
    parts = [split_heads(stream, head_dim) for stream in streams]
    tensors = [x for part in parts for x in part[:3] if x is not None] + cached
    chosen = backend.active(image.q.device.type)
    mixed = [x for stream in streams for x in stream[3:] if x is not None]
    return backend.attention_unsupported(tensors, mixed) or heads_unsupported(chosen, head_dim, streams)
