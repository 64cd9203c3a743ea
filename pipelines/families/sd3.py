"""The family `sd3`: Stable Diffusion 3 and 3.5, one pipeline class, generation only; latents are a grid, not tokens.

The transformer takes time from 0 to 1000, CLIP and T5 states one after the other, and CLIP's pooled embedding.
Guidance doubles the batch in the stock pipeline; it is off when a call is recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family, in_multiples, stock_limit

if TYPE_CHECKING:
    from PIL.Image import Image


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """T5 tokens of each prompt, since T5 reads it whole; CLIP tokens where there is no T5."""
    return [len(ids) for ids in (pipe.tokenizer_3 or pipe.tokenizer)(prompts)["input_ids"]]


def _limit(pipe: Any, call: dict[str, Any]) -> int:
    return stock_limit(pipe, call) if pipe.tokenizer_3 else pipe.tokenizer_max_length


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    like = next((e for e in (pipe.text_encoder_3, pipe.text_encoder) if e is not None), pipe.transformer)
    how = {"device": pipe._execution_device, "dtype": like.dtype}
    return {
        "prompt_embeds": torch.zeros(rows, 1, config.joint_attention_dim, **how),
        "pooled_prompt_embeds": torch.zeros(rows, config.pooled_projection_dim, **how),
    }


def _side(pipe: Any) -> int:
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    x = call["hidden_states"]
    rows = {key: call[key] for key in ("encoder_hidden_states", "pooled_projections")}
    return x, Condition("sd3", tuple(x.shape[1:]), rows)


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    x = x.to(compute_dtype(transformer.proj_out))
    return transformer(x, timestep=sigma * 1000, return_dict=False, **condition.kwargs)[0].float()


def decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    """Pictures of latents (B, C, h, w), which the autoencoder reads after a scale and a shift."""
    grid = x.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0], output_type="pil")


def encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    """Latents (B, C, h, w) of pixels (B, 3, H, W), scaled and shifted as `decode` expects them."""
    latents = pipe.vae.encode(pixels).latent_dist.mode().float()
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


SD3 = Family(
    name="sd3",
    generation="StableDiffusion3Pipeline",
    editing=None,
    lora_targets=r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    prompt_kwargs=("encoder_hidden_states", "pooled_projections"),
    text_components=("text_encoder", "text_encoder_2", "text_encoder_3"),
    prompt_lengths=_lengths,
    prompt_limit=_limit,
    dummy_prompt=_dummy_prompt,
    token_side=_side,
    drawn=in_multiples(_side),
    split=_split,
    velocity=_velocity,
    decode=decode,
    encode_images=encode_images,
)
