"""The family `flux1`: FLUX.1-dev and FLUX.1-Kontext-dev, two pipeline classes over one transformer class.

Packed tokens; a source's tokens follow the latents and carry 1 in their first position. Positions have no batch
dimension, so they are shared. Guidance is a number the transformer reads (`guidance_scale`, 3.5 unless the recipe
says otherwise), one a row; classifier-free guidance exists besides it, with a negative prompt.
By default Kontext scales every picture to a megapixel and every source to one of the sizes it was trained on. Here it
gets the area of the call, and below a megapixel sources keep their shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family, grid_from_ids

if TYPE_CHECKING:
    from PIL.Image import Image


def t5_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt for the T5, which reads it whole; CLIP gives a summary of the first 77."""
    return [len(ids) for ids in pipe.tokenizer_2(prompts)["input_ids"]]


def _encode_prompts(pipe: Any, prompts: list[str], images: Any = None, **call: Any) -> list[dict[str, Any]]:
    limit = {key: call[key] for key in ("max_sequence_length",) if key in call}
    embeds, pooled, _ = pipe.encode_prompt(prompts, **limit)
    pairs = zip(embeds.split(1), pooled.split(1), strict=True)
    return [{"prompt_embeds": e, "pooled_prompt_embeds": p} for e, p in pairs]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    like = pipe.transformer if pipe.text_encoder_2 is None else pipe.text_encoder_2
    how = {"device": pipe._execution_device, "dtype": like.dtype}
    return {
        "prompt_embeds": torch.zeros(rows, 1, config.joint_attention_dim, **how),
        "pooled_prompt_embeds": torch.zeros(rows, config.pooled_projection_dim, **how),
    }


def _trained_sizes() -> list[tuple[int, int]]:
    """Kontext's (width, height), all about a megapixel."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    return PREFERRED_KONTEXT_RESOLUTIONS


def _extra(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Kontext makes the size of the call; it resizes a source when that size is a trained one, or to shrink it."""
    if type(pipe).__name__ != "FluxKontextPipeline":
        return {}
    width, height, image = call.get("width", 1024), call.get("height", 1024), call.get("image")
    large = image is not None and image.width * image.height > 1024**2
    return {"max_area": height * width, "_auto_resize": large or (width, height) in _trained_sizes()}


def _size_of(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """The trained (height, width) of the nearest aspect ratio, brought down to the area of the call's."""
    ratio, side = image.width / image.height, 2 * pipe.vae_scale_factor
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in _trained_sizes())
    scale = min(1.0, math.sqrt(call.get("height", 1024) * call.get("width", 1024)) / 1024)
    return max(side, int(height * scale) // side * side), max(side, int(width * scale) // side * side)


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, n = call["hidden_states"], int((call["img_ids"][:, 0] == 0).sum())  # 1 marks a source's tokens
    rows = {key: call[key] for key in ("encoder_hidden_states", "pooled_projections", "guidance")}
    shared = {key: call[key] for key in ("txt_ids", "img_ids")}
    context = tokens[:, n:].clone() if tokens.shape[1] > n else None
    return tokens[:, :n], Condition("flux1", tuple(tokens[:, :n].shape[1:]), rows, context, shared)


def velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The velocity of packed tokens, whose source follows them."""
    tokens = x if condition.context is None else torch.cat([x, condition.context.to(x.dtype)], dim=1)
    time = (sigma * 1000).to(condition.kwargs["encoder_hidden_states"].dtype) / 1000  # type: ignore[union-attr]
    inputs = {"hidden_states": tokens.to(compute_dtype(transformer.x_embedder)), "timestep": time}
    out = transformer(**inputs, **condition.kwargs, **condition.shared, return_dict=False)[0]
    return out[:, : x.shape[1]].float()


def decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    grid = pipe._unpack_latents(x.to(pipe.vae.dtype), height, width, pipe.vae_scale_factor)
    grid = grid / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0], output_type="pil")


def encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels).latent_dist.mode().float()
    grid = (grid - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(grid, *grid.shape)


FLUX1 = Family(
    name="flux1",
    generation="FluxPipeline",
    editing="FluxKontextPipeline",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
    guidance_off={"true_cfg_scale": 1.0},
    guidance_on=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ""},
    prompt_kwargs=("encoder_hidden_states", "pooled_projections"),
    text_components=("text_encoder", "text_encoder_2"),
    call=("max_sequence_length", "guidance_scale"),
    prompt_lengths=t5_lengths,
    encode_prompts=_encode_prompts,
    dummy_prompt=_dummy_prompt,
    extra=_extra,
    size_of=_size_of,
    grid=lambda condition: grid_from_ids(condition.shared["img_ids"], condition.shape[0]),
    split=_split,
    velocity=velocity,
    decode=decode,
    encode_images=encode_images,
)
