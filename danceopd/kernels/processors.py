"""Fused attention processors for the stock diffusers attention modules of FLUX, SD3, Qwen-Image and Z-Image.

Each replaces one stock processor, keeps it, and calls it for whatever it does not support (context parallelism, for
example). Projections, LoRA adapters on them and output layers are the module's own. Replaced is what lies between
projections and attention (per-head norm, rotary embedding, joining, copies), and the choice of the attention backend.
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

from danceopd.kernels.attention import attend
from danceopd.kernels.attention_backends import AttentionCall, CachedKV, joined_kv
from danceopd.kernels.functional import joint_qkv, parallel_qkv, swiglu_concat
from danceopd.kernels.inputs import Stream, rope_table
from danceopd.kernels.masks import all_true, extend

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class FusedProcessor:
    """A processor in the place of `stock`. `eps`, `round_first`: of the module's norms (see `functional.joint_qkv`)."""

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
    def selects_backend(self) -> bool:
        """Whether `attention.py` chooses the attention backend: not if the user set one in diffusers."""
        active = _AttentionBackendRegistry.get_active_backend()[0]
        return self._attention_backend is None and active == AttentionBackendName.NATIVE

    def run_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, source: CachedKV | None = None
    ) -> Tensor:
        """Attention of q, k, v `(B, S, H, D)` -> `(B, S, H·D)`."""
        if self.selects_backend:
            out = attend(q, k, v, mask, source)
        else:
            k, v = joined_kv(AttentionCall(q, k, v, source=source))
            if mask is not None and mask.ndim == 2:
                mask = None if all_true(mask) else extend(mask, k.shape[1])[:, None, None, :]
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
        source: CachedKV | None = None,
    ) -> Tensor:
        """Project, prepare and attend one or two streams, each with its rotary table (cos, sin): `(B, S, H·D)`."""
        image = _stream(attn, hidden, ("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k"), rope)
        text = None
        if context is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k")
            text = _stream(attn, context, *names, text_rope)
        fixed: dict[str, Any] = {"eps": self.eps, "round_first": self.round_first, "text_first": self.text_first}
        return self.run_attention(*joint_qkv(image, text, head_dim=head_dim(attn), **fixed), mask, source)


def _stream(attn: Any, x: Tensor, apart: Any, packed: str, norms: tuple[str, str], rope: Any) -> Stream:
    weights = [getattr(getattr(attn, name, None), "weight", None) for name in norms]
    if getattr(attn, "fused_projections", False) and hasattr(attn, packed):
        return Stream(getattr(attn, packed)(x), None, None, *weights, *rope)
    return Stream(*(getattr(attn, name)(x) for name in apart), *weights, *rope)


def head_dim(attn: Any) -> int:
    """Columns of a head; diffusers' shared `Attention` class has no attribute for it."""
    return getattr(attn, "head_dim", None) or attn.inner_dim // attn.heads


def _halves(rope: Any, text: int) -> tuple[Any, Any]:
    """A joint rotary table (cos, sin), text first, split into those of image and text."""
    if rope is None:
        return (None, None), (None, None)
    return tuple(t[..., text:, :] for t in rope), tuple(t[..., :text, :] for t in rope)


class FusedFlux(FusedProcessor):
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
        return self.forward(*given) if self.supports(attn, encoder_hidden_states) else self.stock(*given)

    def supports(self, attn: Any, context: Tensor | None) -> bool:
        """Whether the fused forward computes this call; else `stock` does."""
        return self._parallel_config is None and (context is None) == (attn.added_kv_proj_dim is None)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        rope: Any,
        cached: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """The fused forward of the module; `cached`: keys and values of a source, after those of the text."""
        text = 0 if context is None else context.shape[1]
        source = None if cached is None else CachedKV(*cached, text)
        out = self.attention(attn, hidden_states, context, *_halves(rope, text), attention_mask, source)
        if context is None:
            return out if getattr(attn, "pre_only", False) else _output(attn, out)
        return _output(attn, out[:, text:].contiguous()), attn.to_add_out(out[:, :text].contiguous())


def _output(attn: Any, out: Tensor) -> Tensor:
    for layer in attn.to_out:
        out = layer(out)
    return out


class FusedFluxKV(FusedFlux):
    """FLUX.2-klein KV's double blocks: keys and values of the source come from a cache, which stock code fills."""

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
        if filling or not self.supports(attn, encoder_hidden_states):
            return self.stock(*given, kv_cache, kv_cache_mode, num_ref_tokens)
        cached = kv_cache_mode == "cached" and kv_cache is not None
        return self.forward(*given, kv_cache.get() if cached else None)


class FusedFlux2Parallel(FusedProcessor):
    """FLUX.2's single blocks: one projection for q, k, v and the feed-forward, one output projection for both."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        given = attn, hidden_states, attention_mask, image_rotary_emb
        return self.forward(*given) if self.supports(attn) else self.stock(*given)

    def supports(self, attn: Any) -> bool:
        """Whether the fused forward computes this module; else `stock` does."""
        columns = 3 * attn.inner_dim + 2 * attn.mlp_hidden_dim
        return self._parallel_config is None and attn.to_qkv_mlp_proj.out_features == columns

    def forward(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, rope: Any, source: CachedKV | None = None
    ) -> Tensor:
        """The fused forward of the module; `source`: cached keys and values, inserted among its own."""
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
        out = self.run_attention(q, k, v, attention_mask, source)
        return attn.to_out(torch.cat([out, rest], dim=-1) if gated else swiglu_concat(rest, passed=out))


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
        if filling or not self.supports(attn):
            return self.stock(*given, kv_cache, kv_cache_mode, num_txt_tokens, num_ref_tokens)
        source = None
        if kv_cache_mode == "cached" and kv_cache is not None:
            k, v = kv_cache.get()
            source = CachedKV(k, v, num_txt_tokens)
        return self.forward(*given, source)


class FusedSD3(FusedProcessor):
    """Stable Diffusion 3: image first, no rotary embedding; also its second, image-only attention."""

    text_first = False

    @property
    def selects_backend(self) -> bool:
        """Always: the stock processor calls SDPA, whatever backend is set."""
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


class FusedQwen(FusedProcessor):
    """Qwen-Image: two streams, text first, a complex rotary rope_table for each, a mask over padded text."""

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
        image_rope, text_rope = ((None, None) if rope is None else (rope_table(rope), None) for rope in ropes)
        if text_mask is not None and text_mask.dtype != torch.bool:
            text_mask = text_mask.bool()
        text = context.shape[1]
        out = self.attention(attn, hidden_states, context, image_rope, text_rope, text_mask)
        return _output(attn, out[:, text:].contiguous()), attn.to_add_out(out[:, :text].contiguous())


class FusedZImage(FusedProcessor):
    """Z-Image: one stream, a complex rotary rope_table for each sample, a mask over padded tokens."""

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
        rope = (None, None) if freqs_cis is None else (rope_table(freqs_cis), None)
        return _output(attn, self.attention(attn, hidden_states, None, rope, mask=attention_mask))


PROCESSORS: dict[type, type[FusedProcessor]] = {
    FluxAttnProcessor: FusedFlux,
    Flux2AttnProcessor: FusedFlux,
    Flux2ParallelSelfAttnProcessor: FusedFlux2Parallel,
    Flux2KVAttnProcessor: FusedFluxKV,
    Flux2KVParallelSelfAttnProcessor: FusedFlux2ParallelKV,
    JointAttnProcessor2_0: FusedSD3,
    QwenDoubleStreamAttnProcessor2_0: FusedQwen,
    ZSingleStreamAttnProcessor: FusedZImage,
}


def fused_processor(attn: nn.Module) -> FusedProcessor | None:
    """The fused processor for an attention module; None if its processor or its norms are not supported."""
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
