"""What the kernels of this room read: one stream's projections, its norm weights and its rotary table.

A stream is text or image tokens. Its projections are separate `(B, S, H·D)` tensors or one packed `(B, S, 3·H·D)`;
a `Part` holds them as `(B, S, H, D)` views, so that nobody behind the front needs to know which.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """One stream as its model has it. `B` rows, `S` tokens, `H` heads of `D` columns.

    `q`, `k`, `v`: `(B, S, H·D)`, any strides but 1 along the last; or `q` packed `(B, S, 3·H·D)` with `k` and `v`
    None; or `v` None, where attention reads it where it lies. `weight_q`, `weight_k`: `(D,)`, or None where nothing
    is normalised. `cos`, `sin`: `(S, D)` or `(B, S, D)` with every value twice, as diffusers keeps them for FLUX;
    or `cos` the pairs `cos0 sin0 cos1 sin1 …` of a complex table and `sin` None; or both None.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class Part(NamedTuple):
    """A stream with its heads apart: `q`, `k`, `v` are `(B, S, H, D)` views."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def heads_apart(stream: Stream, head_dim: int) -> Part:
    """Views of the stream's projections, heads in their own dimension; a packed one is taken apart."""
    q, k, v = stream.q, stream.k, stream.v
    if k is None:
        q, k, v = stream.q.chunk(3, dim=-1)
    q, k = q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim))
    return Part(q, k, None if v is None else v.unflatten(-1, (-1, head_dim)), *stream[3:])


def heads(stream: Stream, head_dim: int) -> int:
    """How many heads a stream has."""
    return stream.q.shape[-1] // head_dim // (3 if stream.k is None else 1)


def first_rows(image: Part, text: Part | None, text_first: bool) -> tuple[int, int]:
    """First rows of image and text in the joint sequence."""
    if text is None:
        return 0, 0
    return (text.q.shape[1], 0) if text_first else (0, image.q.shape[1])


def table(freqs: Tensor) -> Tensor:
    """A complex rotary table `(…, D/2)` as pairs `(…, D)`, without a copy."""
    from torch import view_as_real

    return view_as_real(freqs).flatten(-2)
