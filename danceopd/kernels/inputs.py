"""The inputs of the kernels: q, k, v projections of one stream of tokens, its norm weights and its rotary table.

A stream is the image tokens or the text tokens of a transformer block. A model gives its projections as separate
`(B, S, H·D)` tensors or as one packed `(B, S, 3·H·D)` tensor (`Stream`); `split_heads` turns both into `(B, S, H, D)`
views (`SplitStream`), which is what the kernels and `reference.py` take.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """One stream as its model has it: `B` rows, `S` tokens, `H` heads of `D` columns.

    `q`, `k`, `v`: `(B, S, H·D)` with contiguous last dimension; or `q` packed `(B, S, 3·H·D)` with `k` and `v` None;
    or `v` None, where attention reads it in place. `weight_q`, `weight_k`: RMSNorm weights `(D,)`, None for no norm.
    `cos`, `sin`: `(S, D)` or `(B, S, D)` with every value twice, as diffusers keeps them for FLUX; or `cos` holds the
    pairs `cos0 sin0 cos1 sin1 …` of a complex table and `sin` is None; or both None for no rotation.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class SplitStream(NamedTuple):
    """A stream with its heads split: `q`, `k`, `v` are `(B, S, H, D)` views; the other fields as in `Stream`."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def split_heads(stream: Stream, head_dim: int) -> SplitStream:
    """Views of the stream's projections with a dimension for the heads; packed ones are taken apart."""
    q, k, v = stream.q, stream.k, stream.v
    if k is None:
        q, k, v = stream.q.chunk(3, dim=-1)
    q, k = q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim))
    return SplitStream(q, k, None if v is None else v.unflatten(-1, (-1, head_dim)), *stream[3:])


def num_heads(stream: Stream, head_dim: int) -> int:
    """How many heads a stream has."""
    return stream.q.shape[-1] // head_dim // (3 if stream.k is None else 1)


def joint_shape(image: Stream, text: Stream | None, head_dim: int) -> tuple[int, int, int, int]:
    """`(B, S, H, D)` of the joint sequence of both streams."""
    tokens = image.q.shape[1] + (0 if text is None else text.q.shape[1])
    return image.q.shape[0], tokens, num_heads(image, head_dim), head_dim


def stream_offsets(image: SplitStream, text: SplitStream | None, text_first: bool) -> tuple[int, int]:
    """Where image and text begin in the joint sequence."""
    if text is None:
        return 0, 0
    return (text.q.shape[1], 0) if text_first else (0, image.q.shape[1])


def rope_table(freqs: Tensor) -> Tensor:
    """A complex rotary table `(…, D/2)` as pairs `(…, D)`, without a copy: the `cos` of a `Stream`, with `sin` None."""
    from torch import view_as_real

    return view_as_real(freqs).flatten(-2)
