"""The family `hidream`: HiDream-I1, one pipeline class, generation only; latents are a grid.

Four text encoders: CLIP's two give a summary, T5 and Llama are read whole, Llama in a list of layers of which the
transformer's configuration names one for each block. All are padded to `max_sequence_length`, without a mask. The
transformer takes time from 0 to 1000, and its output is x0 − ε. Its feed-forward layers are mixtures of experts, whose
inference path has no gradient: here they always take the other one, which gives the same numbers.
The stock pipeline brings every size to the area of a megapixel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family, stock_limit
from .sd3 import decode, encode_images

LLAMA = "encoder_hidden_states_llama3"


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt for the encoder, of T5 and Llama, that makes more of it."""
    t5, llama = (t(prompts)["input_ids"] for t in (pipe.tokenizer_3, pipe.tokenizer_4))
    return [max(len(a), len(b)) for a, b in zip(t5, llama, strict=True)]


def _limit(pipe: Any, call: dict[str, Any]) -> int:
    tokenizers = [t for t in (pipe.tokenizer_3, pipe.tokenizer_4) if t is not None]  # a plan may have none
    return min([stock_limit(pipe, call), *(t.model_max_length for t in tokenizers)])


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    how = {"device": pipe._execution_device, "dtype": like.dtype}
    return {
        "pooled_prompt_embeds": torch.zeros(rows, config.text_emb_dim, **how),
        "prompt_embeds_t5": torch.zeros(rows, 1, config.caption_channels[0], **how),
        "prompt_embeds_llama3": torch.zeros(1, rows, 1, config.caption_channels[1], **how),
    }


def _drawn(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that the stock pipeline draws: a megapixel in the call's shape."""
    side = 2 * pipe.vae_scale_factor
    scale = math.sqrt((pipe.default_sample_size * pipe.vae_scale_factor) ** 2 / (width * height))
    return int(height * scale // side * side), int(width * scale // side * side)


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    x = call["hidden_states"]
    rows = {key: call[key] for key in ("encoder_hidden_states_t5", "pooled_embeds")}
    rows[LLAMA] = call[LLAMA].transpose(0, 1).contiguous()
    return x, Condition("hidream", tuple(x.shape[1:]), rows)


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    for block in (*transformer.double_stream_blocks, *transformer.single_stream_blocks):
        experts = block.block.ff_i
        experts.training, experts._force_inference_output = True, False  # the path that has a gradient
    llama, rest = condition.kwargs[LLAMA], {key: v for key, v in condition.kwargs.items() if key != LLAMA}
    rest[LLAMA] = llama.transpose(0, 1)  # type: ignore[union-attr]
    x = x.to(compute_dtype(transformer.final_layer.linear))
    return -transformer(x, timesteps=sigma * 1000, return_dict=False, **rest)[0].float()


HIDREAM = Family(
    name="hidream",
    generation="HiDreamImagePipeline",
    editing=None,
    lora_targets=r"(double|single)_stream_blocks\.\d+\.block"
    r"\.(attn1\.to_(q|k|v|out)(_t)?|ff_t\.w[123]|ff_i\.(shared_experts\.)?w[123])",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    prompt_kwargs=("encoder_hidden_states_t5", LLAMA, "pooled_embeds"),
    text_components=("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
    prompt_lengths=_lengths,
    prompt_limit=_limit,
    dummy_prompt=_dummy_prompt,
    drawn=_drawn,
    split=_split,
    velocity=_velocity,
    sync_free=None,  # tokens are sorted by expert
    decode=decode,
    encode_images=encode_images,
)
