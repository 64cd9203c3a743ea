"""Attention of projections: `qkv_prep` and then the core, or one kernel that does both.

`danceopd::prepared_attention` normalises and rotates q and k as it loads them. That spares a pass over q, k and v, but
every block of 64 queries prepares all keys again, which takes about as long as its products with them. So it is asked
by a rule (`pays`): only where `ragged_attention` is the core anyway, never for dense rows, and only up to
`BLOCKS` blocks of queries. Everything else, and whatever needs a gradient, is prepared first. See docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import choose
from .core import asked, attend, settled
from .cores import Call, Source
from .front import _heads_problem, joint_qkv
from .parts import Stream, heads, heads_apart
from .ragged import prepared_attention

QUERIES = 64
"""Queries of one block of the kernel."""
BLOCKS = 2
"""Blocks of queries of the longest sample up to which preparing keys in each of them is cheaper than a pass before."""


def joint_attention(
    image: Stream,
    text: Stream | None = None,
    mask: Tensor | None = None,
    source: Source | None = None,
    *,
    head_dim: int,
    eps: float,
    round_first: bool = False,
    text_first: bool = True,
    prologue: bool | None = None,
) -> Tensor:
    """`attend` of what `joint_qkv` makes of the streams: `(B, S, H, D)`. See both for the arguments.

    `prologue`: norm and rotation inside the attention kernel by the rule of `pays`, or wherever the kernel can run
    (True), or never (False). Keys of a source are normalised and rotated already. Where it does not run nothing
    but time is different: both ways round at the same places.
    """
    dense = mask is None and source is None
    if prologue or (prologue is None and not dense):
        call = _call(image, text, mask, source, head_dim)
        if (prologue or pays(call)) and (call.mask is None or call.rows is not None):
            problem = _problem(image, text, source, head_dim)
            if not problem:
                lists = (None, None) if call.rows is None else (call.rows.cumulative, call.rows.tokens)
                cached = (None, None) if source is None else (source.k, source.v)
                fixed = head_dim, eps, round_first, text_first, head_dim**-0.5
                rest = (None,) * 7 if text is None else text
                return prepared_attention(*image, *rest, *lists, *cached, _longest(call), *fixed)
            if choose.active(image.q.device.type) != "torch":
                choose.once(f"attention prepares q and k in a pass of its own: {problem}")
    q, k, v = joint_qkv(image, text, head_dim=head_dim, eps=eps, round_first=round_first, text_first=text_first)
    return attend(q, k, v, mask, source)


def pays(call: Call) -> bool:
    """Whether the prologue is worth its work: our kernel is the core for this form, and queries are few."""
    if call.rows is None and (call.mask is not None or call.source is None):
        return False
    return _longest(call) <= BLOCKS * QUERIES and settled(call) == "ours"


def _longest(call: Call) -> int:
    return call.q.shape[1] if call.rows is None else call.rows.longest


def _call(image: Stream, text: Stream | None, mask: Tensor | None, source: Source | None, head_dim: int) -> Call:
    """What `attend` would be asked; q, k and v have their shapes and no memory."""
    tokens = image.q.shape[1] + (0 if text is None else text.q.shape[1])
    shape = image.q.shape[0], tokens, heads(image, head_dim), head_dim
    like = image.q.detach().new_empty(()).expand(shape)
    return asked(Call(like, like, like, mask, None, source))


def _problem(image: Stream, text: Stream | None, source: Source | None, head_dim: int) -> str:
    """Why the prologue cannot run, "" if it can."""
    streams = [image] if text is None else [image, text]
    cached = [] if source is None else [source.k, source.v]
    given = [x for stream in streams for x in stream if x is not None] + cached
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "the prologue has no gradient"
    if any(stream.k is not None and stream.v is None for stream in streams):
        return "values are elsewhere"
    if len({tuple(None if x is None else x.dtype for x in stream[3:]) for stream in streams}) > 1:
        return "text and image have other norms or rotary tables"
    parts = [heads_apart(stream, head_dim) for stream in streams]
    tensors = [x for part in parts for x in part[:3] if x is not None] + cached
    backend = choose.active(image.q.device.type)
    wide = [x for stream in streams for x in stream[3:] if x is not None]
    return choose.outside_attention(tensors, wide) or _heads_problem(backend, head_dim, streams)
