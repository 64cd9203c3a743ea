"""Fused forwards for the stock transformer blocks of FLUX, SD3, Qwen-Image and Z-Image, and for their SwiGLU.

A block does: normalise and modulate, attend, gate and add, normalise and modulate, feed forward, gate and add. Here
"gate and add" and the "normalise and modulate" after it are one pass (`functional.add_norm`). Linear layers are called
as modules, so LoRA adapters on them act. A call with arguments that these forwards do not support goes to the block's
own forward. `PATCHES` says which method of which class each function replaces; `kernels.install` sets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm, SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import FeedForward, ZImageTransformerBlock
from torch import Tensor, nn

from danceopd.kernels.functional import add_norm, swiglu_concat


def _clipped(x: Tensor) -> Tensor:
    """fp16 hidden states clipped to their range, as in the stock blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _modulated(x: Tensor, norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    """`norm(x)·(1 + scale) + shift`."""
    return add_norm(x, scale=scale, shift=shift, eps=norm.eps)[1]  # type: ignore[arg-type]


def _gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate·y`."""
    return add_norm(x, y, gate, kind="none")[0]


def flux2_double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`Flux2TransformerBlock.forward`."""
    x, context = hidden_states, encoder_hidden_states
    (shift, scale, gate), (ff_shift, ff_scale, ff_gate) = Flux2Modulation.split(temb_mod_img, 2)
    (c_shift, c_scale, c_gate), (c_ff_shift, c_ff_scale, c_ff_gate) = Flux2Modulation.split(temb_mod_txt, 2)
    y, c = block.attn(
        hidden_states=_modulated(x, block.norm1, scale, shift),
        encoder_hidden_states=_modulated(context, block.norm1_context, c_scale, c_shift),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, n = add_norm(x, y, gate, scale=ff_scale, shift=ff_shift, eps=block.norm2.eps)
    x = _gated_add(x, block.ff(n), ff_gate)
    context, n = add_norm(context, c, c_gate, scale=c_ff_scale, shift=c_ff_shift, eps=block.norm2_context.eps)
    return _clipped(_gated_add(context, block.ff_context(n), c_ff_gate)), x


def flux2_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """`Flux2SingleTransformerBlock.forward`."""
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    shift, scale, gate = Flux2Modulation.split(temb_mod, 1)[0]
    n = _modulated(x, block.norm, scale, shift)
    y = block.attn(hidden_states=n, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = _clipped(_gated_add(x, y, gate))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


def flux1_double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`FluxTransformerBlock.forward`."""
    x, context = hidden_states, encoder_hidden_states
    if joint_attention_kwargs:  # image prompts, say
        stock = type(block).forward
        return stock(block, x, context, temb, image_rotary_emb, joint_attention_kwargs)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _modulation(block.norm1, temb, 6)
    c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = _modulation(block.norm1_context, temb, 6)
    y, c = block.attn(
        hidden_states=_modulated(x, block.norm1.norm, scale, shift),
        encoder_hidden_states=_modulated(context, block.norm1_context.norm, c_scale, c_shift),
        image_rotary_emb=image_rotary_emb,
    )
    x, n = add_norm(x, y, gate, scale=ff_scale, shift=ff_shift, eps=block.norm2.eps)
    x = _gated_add(x, block.ff(n), ff_gate)
    context, n = add_norm(context, c, c_gate, scale=c_ff_scale, shift=c_ff_shift, eps=block.norm2_context.eps)
    return _clipped(_gated_add(context, block.ff_context(n), c_ff_gate)), x


def _modulation(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(temb)).chunk(count, dim=1)


def flux1_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`FluxSingleTransformerBlock.forward`."""
    text = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _modulation(block.norm, temb, 3)
    n = _modulated(x, block.norm.norm, scale, shift)
    y = block.attn(hidden_states=n, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    y = block.proj_out(torch.cat([y, block.act_mlp(block.proj_mlp(n))], dim=2))
    x = _clipped(_gated_add(x, y, gate))
    return x[:, :text], x[:, text:]


def sd3_joint(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`JointTransformerBlock.forward`."""
    x, context = hidden_states, encoder_hidden_states
    if joint_attention_kwargs or block._chunk_size is not None:
        return type(block).forward(block, x, context, temb, joint_attention_kwargs)
    modulation = _modulation(block.norm1, temb, 9 if block.use_dual_attention else 6)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation[:6]
    last = block.context_pre_only
    if last:
        c_norm = block.norm1_context
        c_scale, c_shift = c_norm.linear(c_norm.silu(temb).to(context.dtype)).chunk(2, dim=1)
    else:
        c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = _modulation(block.norm1_context, temb, 6)
    y, c = block.attn(
        hidden_states=_modulated(x, block.norm1.norm, scale, shift),
        encoder_hidden_states=_modulated(context, block.norm1_context.norm, c_scale, c_shift),
    )
    if block.use_dual_attention:
        second = block.attn2(hidden_states=_modulated(x, block.norm1.norm, modulation[7], modulation[6]))
        x, y, gate = _gated_add(x, y, gate), second, modulation[8]
    x, n = add_norm(x, y, gate, scale=ff_scale, shift=ff_shift, eps=block.norm2.eps)
    x = _gated_add(x, block.ff(n), ff_gate)
    if last:
        return None, x
    context, n = add_norm(context, c, c_gate, scale=c_ff_scale, shift=c_ff_shift, eps=block.norm2_context.eps)
    return _gated_add(context, block.ff_context(n), c_ff_gate), x


def qwen_double(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[Tensor, Tensor]:
    """`QwenImageTransformerBlock.forward`."""
    x, context, kwargs = hidden_states, encoder_hidden_states, joint_attention_kwargs
    if modulate_index is not None or block.zero_cond_t:  # two modulations in one stream
        stock = type(block).forward
        return stock(block, x, context, encoder_hidden_states_mask, temb, image_rotary_emb, kwargs, modulate_index)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = block.img_mod(temb).chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = block.txt_mod(temb).chunk(6, dim=-1)
    y, c = block.attn(
        hidden_states=_modulated(x, block.img_norm1, scale, shift),
        encoder_hidden_states=_modulated(context, block.txt_norm1, c_scale, c_shift),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(kwargs or {}),
    )
    x, n = add_norm(x, y, gate, scale=ff_scale, shift=ff_shift, eps=block.img_norm2.eps)
    x = _gated_add(x, block.img_mlp(n), ff_gate)
    context, n = add_norm(context, c, c_gate, scale=c_ff_scale, shift=c_ff_shift, eps=block.txt_norm2.eps)
    return _clipped(_gated_add(context, block.txt_mlp(n), c_ff_gate)), _clipped(x)


def z_image(
    block: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """`ZImageTransformerBlock.forward`: RMSNorm before and after each branch, tanh gates."""
    if noise_mask is not None:  # two modulations in one stream
        stock = type(block).forward
        return stock(block, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    scale = gate = ff_scale = ff_gate = None
    if block.modulation:
        scale, gate, ff_scale, ff_gate = block.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
        gate, ff_gate = gate.tanh(), ff_gate.tanh()
    norms = block.attention_norm1, block.attention_norm2, block.ffn_norm1, block.ffn_norm2
    first, second, third, fourth = ({"weight": norm.weight, "eps": norm.eps} for norm in norms)
    n = add_norm(x, scale=scale, kind="rms", **first)[1]
    y = block.attention(n, attention_mask=attn_mask, freqs_cis=freqs_cis)
    branch = {"rms_y": True, "y_weight": second["weight"], "y_eps": second["eps"]}
    x, n = add_norm(x, y, gate, scale=ff_scale, kind="rms", **third, **branch)
    branch = {"rms_y": True, "y_weight": fourth["weight"], "y_eps": fourth["eps"]}
    return add_norm(x, block.feed_forward(n), ff_gate, kind="none", **branch)[0]


def flux2_swiglu(act: Any, x: Tensor) -> Tensor:
    """`Flux2SwiGLU.forward`."""
    return swiglu_concat(x)


def z_image_gating(feed_forward: Any, x1: Tensor, x3: Tensor) -> Tensor:
    """`FeedForward._forward_silu_gating`."""
    return swiglu_concat(x1, x3)


# Class -> the method that is replaced, the function in its place, and the norms it computes itself (attribute names).

_DOUBLE = ("norm2", "norm2_context")
PATCHES: dict[type, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    Flux2TransformerBlock: ("forward", flux2_double, ("norm1", "norm1_context", *_DOUBLE)),
    Flux2SingleTransformerBlock: ("forward", flux2_single, ("norm",)),
    Flux2SwiGLU: ("forward", flux2_swiglu, ()),
    FluxTransformerBlock: ("forward", flux1_double, ("norm1", "norm1_context", *_DOUBLE)),
    FluxSingleTransformerBlock: ("forward", flux1_single, ("norm",)),
    JointTransformerBlock: ("forward", sd3_joint, ("norm1", "norm1_context", *_DOUBLE)),
    QwenImageTransformerBlock: ("forward", qwen_double, ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")),
    ZImageTransformerBlock: ("forward", z_image, ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")),
    FeedForward: ("_forward_silu_gating", z_image_gating, ()),
}
ADAPTIVE = (AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX)


def supported(module: nn.Module) -> bool:
    """Whether a block has the norms that its fused forward expects: layer norms without parameters, or RMSNorm."""
    if type(module) not in PATCHES:
        return False
    kind = RMSNorm if isinstance(module, ZImageTransformerBlock) else nn.LayerNorm
    for name in PATCHES[type(module)][2]:
        norm = getattr(module, name, None)
        if norm is None:  # the context of SD3's last block
            continue
        if isinstance(norm, ADAPTIVE) and getattr(norm, "emb", None) is not None:
            return False
        inner = getattr(norm, "norm", norm)
        if type(inner) is not kind or inner.bias is not None:
            return False
        if kind is nn.LayerNorm and inner.elementwise_affine:
            return False
    return True
