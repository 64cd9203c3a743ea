"""The attention cores that can be had, behind one signature: `core(call) -> (B, S, H, D)`.

Each takes the same `Call`. A core that reads packed rows leaves zeros where a mask hides the query; nothing reads
those rows. `absent` says in words why a core cannot run, before it is tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import choose
from .masks import Rows, over
from .ragged import ragged_attention


class Source(NamedTuple):
    """Keys and values `(B, R, H, D)` from a cache, that every query sees; their place is before own key `at`."""

    k: Tensor
    v: Tensor
    at: int


class Call(NamedTuple):
    """One attention: `q`, `k`, `v` `(B, S, H, D)`.

    `mask`: `(B, M)` bool over the first own keys, or what SDPA takes, or None. `rows` says the same as a `(B, M)` mask
    where that is known.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    rows: Rows | None = None
    source: Source | None = None


def sdpa(call: Call) -> Tensor:
    """torch's own choice, called as diffusers' processors call it."""
    (k, v), mask = joined(call), call.mask
    if mask is not None and mask.ndim == 2 and mask.dtype == torch.bool:
        mask = over(mask, call.k.shape[1])
        if call.source is not None:
            at, source = call.source.at, mask.new_ones(call.source.k.shape[:2])
            mask = torch.cat([mask[:, :at], source, mask[:, at:]], dim=1)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    q, k, v = (x.permute(0, 2, 1, 3) for x in (call.q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(0, 2, 1, 3)


def joined(call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values with those of the source in their place."""
    if call.source is None:
        return call.k, call.v
    at = call.source.at
    return (
        torch.cat([call.k[:, :at], call.source.k, call.k[:, at:]], dim=1),
        torch.cat([call.v[:, :at], call.source.v, call.v[:, at:]], dim=1),
    )


def cudnn(call: Call) -> Tensor:
    """cuDNN through SDPA, also where torch would choose another."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(call)


def flash4(call: Call) -> Tensor:
    """FlashAttention-4, on packed rows where they are ragged."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if call.rows is None:
        return _first(flash_attn_func(call.q, *joined(call)))
    c, n = call.rows.cumulative, call.rows.longest
    lengths = {"cu_seqlens_q": c, "cu_seqlens_k": c, "max_seqlen_q": n, "max_seqlen_k": n}
    return packed(call, lambda q, k, v: _first(flash_attn_varlen_func(q, k, v, **lengths)))


def varlen(call: Call) -> Tensor:
    """torch's own flash attention on packed rows."""
    from torch.nn.attention.varlen import varlen_attn

    assert call.rows is not None
    c, n = call.rows.cumulative, call.rows.longest
    return packed(call, lambda q, k, v: _first(varlen_attn(q, k, v, c, c, n, n)))


def ours(call: Call) -> Tensor:
    """The kernel of `ragged.py`, which reads visible rows where they lie and a source from its cache."""
    lists = (call.rows.cumulative, call.rows.tokens) if call.rows is not None else (None, None)
    source = (call.source.k, call.source.v) if call.source is not None else (None, None)
    longest = call.q.shape[1] if call.rows is None else call.rows.longest
    return ragged_attention(call.q, call.k, call.v, *lists, *source, longest, call.q.shape[-1] ** -0.5)


def packed(call: Call, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Visible rows taken together, `(T, H, D)` each, and put back; zeros elsewhere."""
    assert call.rows is not None
    index = call.rows.places
    out = attention(*(x.flatten(0, 1).index_select(0, index) for x in (call.q, call.k, call.v)))
    return out.new_zeros(call.q.shape).flatten(0, 1).index_copy(0, index, out).view(call.q.shape)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


CORES: dict[str, Callable[[Call], Tensor]] = {
    "sdpa": sdpa,
    "cudnn": cudnn,
    "flash4": flash4,
    "varlen": varlen,
    "ours": ours,
}


def candidates(call: Call) -> tuple[str, ...]:
    """Who may be asked for a call, by its form; torch's own choice first."""
    if call.rows is not None:
        return ("sdpa", "cudnn", "flash4", "varlen", "ours")
    if call.mask is not None:
        return ("sdpa", "cudnn")
    return ("sdpa", "cudnn", "flash4") if call.source is None else ("sdpa", "cudnn", "flash4", "ours")


def absent(name: str, call: Call) -> str:
    """Why a core cannot run this call here, "" where it may be tried."""
    if name == "sdpa":
        return ""
    if name == "ours":
        if needs_gradient(call):
            return "has no gradient"
        source = [] if call.source is None else [call.source.k, call.source.v]
        return choose.outside_attention([call.q, call.k, call.v, *source])
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return "takes bf16 and fp16 only"
    if name == "flash4" and not flash4_version():
        return "not installed (pip install 'danceopd[flash]')"
    if name == "varlen" and not _has_varlen():
        return "this torch has none"
    if call.source is not None and call.rows is not None and name in ("flash4", "varlen"):
        return "takes no source beside ragged rows"
    return ""


def needs_gradient(call: Call) -> bool:
    """Whether somebody will ask for the gradient of a call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))


@functools.cache
def flash4_version() -> str:
    """Of FlashAttention-4, "" where it is not installed."""
    try:
        return version("flash-attn-4")
    except PackageNotFoundError:
        return ""


@functools.cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return False
    return hasattr(varlen, "varlen_attn")
