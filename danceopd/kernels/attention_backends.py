"""The attention backends that `attention.py` chooses from, behind one signature: `backend(call) -> (B, S, H, D)`.

`sdpa` and `cudnn` (torch), `flash4` (FlashAttention-4), `varlen` (torch's flash attention for packed rows). All take
the same `AttentionCall`. A backend that reads unpadded rows leaves zeros at the queries that a mask hides; nothing
reads those. `unavailable` says in words why a backend cannot run, before it is tried.
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

from danceopd.kernels.masks import Unpadded, extend


class CachedKV(NamedTuple):
    """Keys and values `(B, R, H, D)` of a source image, from a cache; every query sees them.

    `at`: they stand before own key `at`.
    """

    k: Tensor
    v: Tensor
    at: int


class AttentionCall(NamedTuple):
    """The inputs of one attention: `q`, `k`, `v` `(B, S, H, D)`.

    `mask`: `(B, M)` bool over the first own keys, or what SDPA takes, or None. `unpadded`: the visible tokens of a
    `(B, M)` mask, where they are known. `source`: further keys and values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    unpadded: Unpadded | None = None
    source: CachedKV | None = None


def sdpa(call: AttentionCall) -> Tensor:
    """`scaled_dot_product_attention` with torch's own choice of kernel, called as diffusers' processors call it."""
    (k, v), mask = joined_kv(call), call.mask
    if mask is not None and mask.ndim == 2 and mask.dtype == torch.bool:
        mask = extend(mask, call.k.shape[1])
        if call.source is not None:
            at, visible = call.source.at, mask.new_ones(call.source.k.shape[:2])
            mask = torch.cat([mask[:, :at], visible, mask[:, at:]], dim=1)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    q, k, v = (x.permute(0, 2, 1, 3) for x in (call.q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(0, 2, 1, 3)


def joined_kv(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Keys and values with those of the source inserted where they belong."""
    if call.source is None:
        return call.k, call.v
    at = call.source.at
    return (
        torch.cat([call.k[:, :at], call.source.k, call.k[:, at:]], dim=1),
        torch.cat([call.v[:, :at], call.source.v, call.v[:, at:]], dim=1),
    )


def cudnn(call: AttentionCall) -> Tensor:
    """cuDNN through SDPA, also where torch would choose another kernel."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(call)


def flash4(call: AttentionCall) -> Tensor:
    """FlashAttention-4, on packed rows where a mask hides tokens."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if call.unpadded is None:
        return _first(flash_attn_func(call.q, *joined_kv(call)))
    c, n = call.unpadded.cu_seqlens, call.unpadded.max_seqlen
    lengths = {"cu_seqlens_q": c, "cu_seqlens_k": c, "max_seqlen_q": n, "max_seqlen_k": n}
    return packed(call, lambda q, k, v: _first(flash_attn_varlen_func(q, k, v, **lengths)))


def varlen(call: AttentionCall) -> Tensor:
    """torch's own flash attention on packed rows."""
    from torch.nn.attention.varlen import varlen_attn

    assert call.unpadded is not None
    c, n = call.unpadded.cu_seqlens, call.unpadded.max_seqlen
    return packed(call, lambda q, k, v: _first(varlen_attn(q, k, v, c, c, n, n)))


def packed(call: AttentionCall, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`attention` of the visible tokens packed into one row, `(T, H, D)` each, and unpacked; zeros elsewhere."""
    assert call.unpadded is not None
    indices = call.unpadded.indices
    out = attention(*(x.flatten(0, 1).index_select(0, indices) for x in (call.q, call.k, call.v)))
    return out.new_zeros(call.q.shape).flatten(0, 1).index_copy(0, indices, out).view(call.q.shape)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


ATTENTION_BACKENDS: dict[str, Callable[[AttentionCall], Tensor]] = {
    "sdpa": sdpa,
    "cudnn": cudnn,
    "flash4": flash4,
    "varlen": varlen,
}


def candidates(call: AttentionCall) -> tuple[str, ...]:
    """The backends that can compute a call of this form (unpadded, masked, dense, with a source); SDPA first."""
    if call.unpadded is not None:
        return ("sdpa", "cudnn", "flash4", "varlen")
    if call.mask is not None:
        return ("sdpa", "cudnn")
    return ("sdpa", "cudnn", "flash4")


def unavailable(name: str, call: AttentionCall) -> str:
    """Why a backend cannot run this call here, "" where it may be tried."""
    if name == "sdpa":
        return ""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return "takes bf16 and fp16 only"
    if name == "flash4" and not flash4_version():
        return "not installed (pip install 'danceopd[flash]')"
    if name == "varlen" and not _has_varlen():
        return "not in this version of torch"
    if call.source is not None and call.unpadded is not None and name in ("flash4", "varlen"):
        return "takes no source beside a padding mask"
    return ""


def needs_gradient(call: AttentionCall) -> bool:
    """Whether a backward pass will go through this call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))


@functools.cache
def flash4_version() -> str:
    """The installed version of FlashAttention-4, "" for none."""
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
