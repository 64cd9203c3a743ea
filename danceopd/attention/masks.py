"""What a padding mask says: whether it hides anything, and which tokens of a padded batch are there.

A mask is `(B, M)` bool over the first M keys, True where a token is there; keys after them are seen by every row. The
device is asked once for each mask, and never inside a CUDA graph's capture or a trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The tokens of a padded batch that are there, row after row; T of them.

    `cumulative` `(B + 1,)` int32: where each row's tokens begin among the T. `tokens` `(T,)` int32: which tokens
    of their own rows they are. `places` `(T,)` int64: in the flattened batch. `longest`: tokens of the longest row.
    """

    cumulative: Tensor
    tokens: Tensor
    places: Tensor
    longest: int


@dataclass
class _Known:
    mask: weakref.ref[Tensor]
    version: int
    full: bool
    rows: dict[int, Rows | None] = field(default_factory=dict)


_known: dict[int, _Known] = {}
_unasked: list[bool] = []


@contextmanager
def unasked() -> Iterator[None]:
    """Inside, masks are taken as they are: what is recorded here meets other masks in the same place."""
    _unasked.append(True)
    try:
        yield
    finally:
        _unasked.pop()


def _facts(mask: Tensor) -> _Known | None:
    """What is known of a mask; None where the device may not be asked now."""
    if torch.compiler.is_compiling() or _unasked:
        return None
    known = _known.get(id(mask))
    if known is None or known.mask() is not mask or known.version != mask._version:
        if capturing(mask):
            return None
        key = id(mask)
        gone = weakref.ref(mask, lambda _: _known.pop(key, None))
        known = _known[key] = _Known(gone, mask._version, bool(mask.all()))
    return known


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of `x`."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def all_true(mask: Tensor) -> bool:
    """Whether a mask hides nothing; False where the device may not be asked."""
    known = _facts(mask)
    return known is not None and known.full


def rows_of(mask: Tensor, tokens: int) -> Rows | None:
    """The visible tokens of rows of `tokens` under `mask (B, M)`; None where nobody may ask, or a row is empty."""
    known = _facts(mask)
    if known is None:
        return None
    if tokens not in known.rows:
        known.rows[tokens] = None if capturing(mask) else _rows(over(mask, tokens))
    return known.rows[tokens]


def _rows(mask: Tensor) -> Rows | None:
    counts = mask.sum(dim=1)
    shortest, longest = torch.stack([counts.min(), counts.max()]).tolist()
    if shortest == 0:  # softmax over nothing: what that means is the core's own affair
        return None
    index = mask.flatten().nonzero()[:, 0]
    cumulative = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return Rows(cumulative, (index % mask.shape[1]).int(), index, longest)


def over(mask: Tensor, tokens: int) -> Tensor:
    """`mask (B, M)` with True behind it, `(B, tokens)`."""
    rest = tokens - mask.shape[1]
    return mask if rest == 0 else torch.cat([mask, mask.new_ones(len(mask), rest)], dim=1)
