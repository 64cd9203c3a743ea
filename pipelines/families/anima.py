"""The family `anima`: Anima, a modular pipeline (../modular.py), generation only; latents are one frame of a video.

A small model turns the states of Qwen3 and the token ids of T5 into the text that the transformer reads; it pads them
to 512 tokens, which are read without a mask. The transformer takes time from 0 to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family, in_multiples, latent_pairs

if TYPE_CHECKING:
    from PIL.Image import Image


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    qwen, t5 = (t(prompts)["input_ids"] for t in (pipe.tokenizer, pipe.t5_tokenizer))
    return [max(len(a), len(b)) for a, b in zip(qwen, t5, strict=True)]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    one = torch.ones(rows, 1, device=pipe._execution_device, dtype=torch.long)
    states = torch.zeros(rows, 1, pipe.text_conditioner.config.source_dim, device=one.device)
    masks = {"qwen_attention_mask": one, "t5_input_ids": one, "t5_attention_mask": one}
    return {"qwen_prompt_embeds": states, **masks}


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    x, rows = call["hidden_states"], {"encoder_hidden_states": call["encoder_hidden_states"]}
    return x, Condition("anima", tuple(x.shape[1:]), rows, shared={"padding_mask": call["padding_mask"]})


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    dtype = compute_dtype(transformer.proj_out)
    time = (sigma * 1000).to(dtype) / 1000
    call = {**condition.kwargs, **condition.shared}
    return transformer(hidden_states=x.to(dtype), timestep=time, return_dict=False, **call)[0].float()


def _statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel."""
    named = (torch.tensor(pipe.vae.config[key]) for key in ("latents_mean", "latents_std"))
    mean, std = (one.view(1, -1, 1, 1, 1).to(like) for one in named)
    return mean, std


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    x = x.to(pipe.vae.dtype)
    mean, std = _statistics(pipe, x)
    x = x / (1 / std) + mean  # by the reciprocal: rounded as the stock block does
    pixels = pipe.vae.decode(x, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    latents = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
    mean, std = _statistics(pipe, latents)
    return (latents - mean) / std


ANIMA = Family(
    name="anima",
    generation="AnimaModularPipeline",
    editing=None,
    lora_targets=r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    guidance_off={},
    guidance_on=lambda scale: {"negative_prompt": ""},  # the scale is the guider's
    prompt_kwargs=("encoder_hidden_states",),
    text_components=("text_encoder",),
    prompt_lengths=_lengths,
    dummy_prompt=_dummy_prompt,
    drawn=in_multiples(latent_pairs),
    grid=lambda condition: (condition.shape[2], condition.shape[3]),
    split=_split,
    velocity=_velocity,
    decode=_decode,
    encode_images=_encode_images,
)
