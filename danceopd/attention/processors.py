"""Attention processors that call the fused front from inside stock diffusers attention modules.

Each stands in for one stock processor, keeps it, and hands back to it whatever it does not cover (context
parallelism, say). Projections, adapters on them, output layers and the attention core are the module's own; only
what lies between is replaced: per-head norm, rotary embedding, joining, copies.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2SwiGLU,
)
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn

from .core import attend
from .cores import Call, Source, joined
from .front import joint_qkv, parallel_qkv, swiglu_behind
from .masks import all_true, over
from .parts import Stream, table
from .prologue import joint_attention

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Fused:
    """A processor in the place of `stock`. `eps` and `round_first` are those of the module's norms."""

    text_first = True

    def __init__(self, stock: Any, eps: float, round_first: bool) -> None:
        self.stock, self.eps, self.round_first = stock, eps, round_first

    @property
    def _attention_backend(self) -> Any:  # what `set_attention_backend` writes reaches the stock processor
        return getattr(self.stock, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    @property
    def chooses(self) -> bool:
        """Whether the core is ours to choose; a backend the user set in diffusers goes first."""
        active = _AttentionBackendRegistry.get_active_backend()[0]
        return self._attention_backend is None and active == AttentionBackendName.NATIVE

    def core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, source: Source | None = None) -> Tensor:
        """Attention itself: `(B, S, H, D)` each -> `(B, S, H·D)`."""
        if self.chooses:
            out = attend(q, k, v, mask, source)
        else:
            k, v = joined(Call(q, k, v, source=source))
            if mask is not None and mask.ndim == 2:
                mask = None if all_true(mask) else over(mask, k.shape[1])[:, None, None, :]
            out = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)
        return out.flatten(2, 3).to(q.dtype)

    def attention(
        self,
        attn: Any,
        hidden: Tensor,
        context: Tensor | None,
        rope: Any,
        text_rope: Any = (None, None),
        mask: Tensor | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """Attention over one or two streams, each with its rotary factors (cos, sin): `(B, S, H·D)`."""
        image = _stream(attn, hidden, ("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k"), rope)
        text = None
        if context is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k")
            text = _stream(attn, context, *names, text_rope)
        fixed: dict[str, Any] = {"eps": self.eps, "round_first": self.round_first, "text_first": self.text_first}
        if self.chooses:
            out = joint_attention(image, text, mask, source, head_dim=head_dim(attn), **fixed)
            return out.flatten(2, 3).to(image.q.dtype)
        return self.core(*joint_qkv(image, text, head_dim=head_dim(attn), **fixed), mask, source)


def _stream(attn: Any, x: Tensor, apart: Any, packed: str, norms: tuple[str, str], rope: Any) -> Stream:
    weights = [getattr(getattr(attn, name, None), "weight", None) for name in norms]
    if getattr(attn, "fused_projections", False) and hasattr(attn, packed):
        return Stream(getattr(attn, packed)(x), None, None, *weights, *rope)
    return Stream(*(getattr(attn, name)(x) for name in apart), *weights, *rope)


def head_dim(attn: Any) -> int:
    """Columns of a head; the shared `Attention` class has no attribute for it."""
    return getattr(attn, "head_dim", None) or attn.inner_dim // attn.heads


def _halves(rope: Any, text: int) -> tuple[Any, Any]:
    """A joint (cos, sin), text first, as those of image and text."""
    if rope is None:
        return (None, None), (None, None)
    return tuple(t[..., text:, :] for t in rope), tuple(t[..., :text, :] for t in rope)


class FusedFlux(Fused):
    """FLUX.1 and FLUX.2: two streams, text first; or the single stream of FLUX.1, which ends before `to_out`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        return self.attended(*given) if self.covers(attn, encoder_hidden_states) else self.stock(*given)

    def covers(self, attn: Any, context: Tensor | None) -> bool:
        return self._parallel_config is None and (context is None) == (attn.added_kv_proj_dim is None)

    def attended(
        self,
        attn: Any,
        hidden_states: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        rope: Any,
        cached: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """The whole module, with cached keys and values behind those of the text or without."""
        text = 0 if context is None else context.shape[1]
        source = None if cached is None else Source(*cached, text)
        out = self.attention(attn, hidden_states, context, *_halves(rope, text), attention_mask, source)
        if context is None:
            return out if getattr(attn, "pre_only", False) else _output(attn, out)
        return _output(attn, out[:, text:].contiguous()), attn.to_add_out(out[:, :text].contiguous())


def _output(attn: Any, out: Tensor) -> Tensor:
    for layer in attn.to_out:
        out = layer(out)
    return out


class FusedFluxKV(FusedFlux):
    """FLUX.2-klein KV's two streams: source keys and values come from a cache. Filling the cache is stock code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Any:
        given = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        filling = kv_cache_mode == "extract" and num_ref_tokens > 0
        if filling or not self.covers(attn, encoder_hidden_states):
            return self.stock(*given, kv_cache, kv_cache_mode, num_ref_tokens)
        cached = kv_cache_mode == "cached" and kv_cache is not None
        return self.attended(*given, kv_cache.get() if cached else None)


class FusedFlux2Parallel(Fused):
    """FLUX.2's single blocks: one projection for q, k, v and the feed-forward, one output projection for both."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        given = attn, hidden_states, attention_mask, image_rotary_emb
        return self.attended(*given) if self.covers(attn) else self.stock(*given)

    def covers(self, attn: Any) -> bool:
        columns = 3 * attn.inner_dim + 2 * attn.mlp_hidden_dim
        return self._parallel_config is None and attn.to_qkv_mlp_proj.out_features == columns

    def attended(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, rope: Any, source: Source | None = None
    ) -> Tensor:
        """The whole module, with a cached source among its keys or without."""
        packed = attn.to_qkv_mlp_proj(hidden_states)
        q, k, v, rest, gated = parallel_qkv(
            packed,
            attn.norm_q.weight,
            attn.norm_k.weight,
            *(rope or (None, None)),
            head_dim=attn.head_dim,
            width=attn.inner_dim,
            eps=self.eps,
            round_first=self.round_first,
        )
        out = self.core(q, k, v, attention_mask, source)
        return attn.to_out(torch.cat([out, rest], dim=-1) if gated else swiglu_behind(rest, passed=out))


class FusedFlux2ParallelKV(FusedFlux2Parallel):
    """FLUX.2-klein KV's single blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Tensor:
        given = attn, hidden_states, attention_mask, image_rotary_emb
        filling = kv_cache_mode == "extract" and num_ref_tokens > 0
        if filling or not self.covers(attn):
            return self.stock(*given, kv_cache, kv_cache_mode, num_txt_tokens, num_ref_tokens)
        source = None
        if kv_cache_mode == "cached" and kv_cache is not None:
            k, v = kv_cache.get()
            source = Source(k, v, num_txt_tokens)
        return self.attended(*given, source)


class FusedSD3(Fused):
    """Stable Diffusion 3: image first, no rotary embedding; also its second, image-only attention."""

    text_first = False

    @property
    def chooses(self) -> bool:  # the stock processor calls SDPA, whatever backend is set
        return True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        image = hidden_states.shape[1]
        out = self.attention(attn, hidden_states, encoder_hidden_states, (None, None))
        if encoder_hidden_states is None:
            return _output(attn, out)
        context = out[:, image:]
        return _output(attn, out[:, :image]), context if attn.context_pre_only else attn.to_add_out(context)


class FusedQwen(Fused):
    """Qwen-Image: two streams, text first, a complex rotary table for each, a mask over padded text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        context, text_mask = encoder_hidden_states, encoder_hidden_states_mask
        if self._parallel_config is not None or context is None or attention_mask is not None:
            return self.stock(attn, hidden_states, context, text_mask, attention_mask, image_rotary_emb)
        ropes = image_rotary_emb or (None, None)
        image_rope, text_rope = ((None, None) if rope is None else (table(rope), None) for rope in ropes)
        if text_mask is not None and text_mask.dtype != torch.bool:
            text_mask = text_mask.bool()
        text = context.shape[1]
        out = self.attention(attn, hidden_states, context, image_rope, text_rope, text_mask)
        return _output(attn, out[:, text:].contiguous()), attn.to_add_out(out[:, :text].contiguous())


class FusedZImage(Fused):
    """Z-Image: one stream, a complex rotary table for each sample, a mask over padded tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        if self._parallel_config is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        rope = (None, None) if freqs_cis is None else (table(freqs_cis), None)
        return _output(attn, self.attention(attn, hidden_states, None, rope, mask=attention_mask))


PROCESSORS: dict[type, type[Fused]] = {
    FluxAttnProcessor: FusedFlux,
    Flux2AttnProcessor: FusedFlux,
    Flux2ParallelSelfAttnProcessor: FusedFlux2Parallel,
    Flux2KVAttnProcessor: FusedFluxKV,
    Flux2KVParallelSelfAttnProcessor: FusedFlux2ParallelKV,
    JointAttnProcessor2_0: FusedSD3,
    QwenDoubleStreamAttnProcessor2_0: FusedQwen,
    ZSingleStreamAttnProcessor: FusedZImage,
}


def fused_for(attn: nn.Module) -> Fused | None:
    """The fused processor for an attention module, or None where its processor or its norms are not covered."""
    kind = PROCESSORS.get(type(getattr(attn, "processor", None)))
    if kind is None:
        return None
    if issubclass(kind, FusedFlux2Parallel) and type(attn.mlp_act_fn) is not Flux2SwiGLU:
        return None
    norms = [norm for norm in (getattr(attn, name, None) for name in NORMS) if norm is not None]
    kinds: set[tuple[type, Any]] = {(type(norm), getattr(norm, "eps", None)) for norm in norms}
    if not norms:
        return kind(attn.processor, 1e-6, False)
    norm, eps = kinds.pop()
    plain = norm in (nn.RMSNorm, RMSNorm) and eps is not None and all(n.weight is not None for n in norms)
    if kinds or not plain or any(getattr(n, "bias", None) is not None for n in norms):
        return None
    if getattr(attn, "norm_q", None) is None or getattr(attn, "norm_k", None) is None:
        return None
    return kind(attn.processor, eps, norm is RMSNorm)
