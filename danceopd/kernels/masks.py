"""Padding masks: whether one hides anything, and the visible tokens of a padded batch (as flash-attn's `unpad_input`).

A mask is `(B, M)` bool over the first M keys, True where a token is visible; keys after those are always visible.
Reading a mask waits for the device, so each mask is read once, and never inside a CUDA graph capture or a trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Unpadded(NamedTuple):
    """The T visible tokens of a padded batch, row after row.

    `cu_seqlens` `(B + 1,)` int32: where each row's tokens begin among the T. `indices` `(T,)` int64: each token's
    position in the flattened batch. `max_seqlen`: tokens of the longest row.
    """

    cu_seqlens: Tensor
    indices: Tensor
    max_seqlen: int


@dataclass
class _MaskInfo:
    mask: weakref.ref[Tensor]
    version: int
    full: bool
    unpadded: dict[int, Unpadded | None] = field(default_factory=dict)


_cache: dict[int, _MaskInfo] = {}
_unread: list[bool] = []


@contextmanager
def masks_unread() -> Iterator[None]:
    """Inside, no mask is read: what is captured into a CUDA graph here will be replayed under other masks."""
    _unread.append(True)
    try:
        yield
    finally:
        _unread.pop()


def _info(mask: Tensor) -> _MaskInfo | None:
    """What is known of a mask; None where it may not be read now."""
    if torch.compiler.is_compiling() or _unread:
        return None
    info = _cache.get(id(mask))
    if info is None or info.mask() is not mask or info.version != mask._version:
        if is_capturing(mask):
            return None
        key = id(mask)
        reference = weakref.ref(mask, lambda _: _cache.pop(key, None))
        info = _cache[key] = _MaskInfo(reference, mask._version, bool(mask.all()))
    return info


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def all_true(mask: Tensor) -> bool:
    """Whether a mask hides nothing; False where it may not be read now."""
    info = _info(mask)
    return info is not None and info.full


def unpad(mask: Tensor, tokens: int) -> Unpadded | None:
    """The visible tokens of rows of `tokens` under `mask (B, M)`; None where it may not be read, or a row has none."""
    info = _info(mask)
    if info is None:
        return None
    if tokens not in info.unpadded:
        info.unpadded[tokens] = None if is_capturing(mask) else _unpad(extend(mask, tokens))
    return info.unpadded[tokens]


def _unpad(mask: Tensor) -> Unpadded | None:
    counts = mask.sum(dim=1)
    shortest, longest = torch.stack([counts.min(), counts.max()]).tolist()
    if shortest == 0:  # softmax over nothing: each attention backend has its own answer to that
        return None
    indices = mask.flatten().nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return Unpadded(cu_seqlens, indices, longest)


def extend(mask: Tensor, tokens: int) -> Tensor:
    """`mask (B, M)` with True appended up to `(B, tokens)`."""
    rest = tokens - mask.shape[1]
    return mask if rest == 0 else torch.cat([mask, mask.new_ones(len(mask), rest)], dim=1)
