"""The family `krea2`: Krea 2 Raw and Turbo, one pipeline class, generation only; packed tokens.

Prompts are states of twelve layers of Qwen3-VL. The stock pipeline pads each to `max_sequence_length` in its middle and
masks the padding, in which nothing has a place of its own: here it is left out, so that rows have as many tokens as
they need. Guidance is `v + s (v − v_null)`, off at 0. `is_distilled` in the pipeline's configuration is what tells
Turbo's schedule from Raw's. Its licences aside, a LoRA that was trained on Raw runs on Turbo: `accept: base`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT = ("encoder_hidden_states", "encoder_attention_mask")
TRIMMED = "trimmed"  # a key of `Condition.fixed`, set once the text padding is trimmed
BUCKET = 32
"""For CUDA graphs, rows of unlike text lengths are padded to a multiple of this; the mask hides what is added."""


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt with the template's ending, which is added to it, but without the template's beginning."""
    texts = [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]
    more = pipe.prompt_template_encode_num_suffix_tokens - pipe.prompt_template_encode_start_idx
    return [len(ids) + more for ids in pipe.tokenizer(texts)["input_ids"]]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, config.num_text_layers, config.text_hidden_dim)
    text = torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)
    return {"prompt_embeds": text, "prompt_embeds_mask": torch.ones(rows, 1, dtype=torch.bool, device=text.device)}


def _side(pipe: Any) -> int:
    return pipe.vae_scale_factor * pipe.patch_size


def _drawn(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """The (height, width) that the stock pipeline draws: rounded up to whole tokens."""
    side = _side(pipe)
    return -(-height // side) * side, -(-width // side) * side


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    x, text, mask = call["hidden_states"], *(call[key] for key in TEXT)
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    order = (~mask).byte().argsort(dim=1, stable=True)  # the padding moves to the end
    longest = max(1, int(mask.sum(dim=1).max()))
    text, mask = (t.gather(1, order.view(*order.shape, *[1] * (t.ndim - 2)).expand_as(t)) for t in (text, mask))
    kwargs: dict[str, Tensor | None] = {TEXT[0]: text[:, :longest].clone(), TEXT[1]: mask[:, :longest].clone()}
    places = {"img_ids": call["position_ids"][-x.shape[1] :].clone()}
    return x, Condition("krea2", tuple(x.shape[1:]), kwargs, shared=places, ragged=TEXT)


def _trimmed(condition: Condition, multiple: int = 1) -> Condition:
    """The text cut to the longest row, without a mask where all rows are full; else padded to a multiple of tokens."""
    if TRIMMED in condition.fixed:
        return condition
    text, mask = (condition.kwargs[key] for key in TEXT)
    assert text is not None and mask is not None
    lengths = mask.sum(dim=1).tolist()
    longest, even = max(lengths), len(set(lengths)) == 1
    text, kept = text[:, :longest], None if even else mask[:, :longest]
    if kept is not None and (more := -longest % multiple):
        text, kept = F.pad(text, (0, 0, 0, 0, 0, more)), F.pad(kept, (0, more))
    kwargs = {**condition.kwargs, TEXT[0]: text, TEXT[1]: kept}
    return replace(condition, kwargs=kwargs, fixed={**condition.fixed, TRIMMED: True})


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    condition = _trimmed(condition)
    text, mask = (condition.kwargs[key] for key in TEXT)
    assert text is not None
    places = condition.shared["img_ids"]
    out = transformer(
        hidden_states=x.to(compute_dtype(transformer.img_in)),
        encoder_hidden_states=text,
        timestep=((sigma * 1000) / 1000).to(text.dtype),
        position_ids=torch.cat([places.new_zeros(text.shape[1], 3), places]),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    return out.float()


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    grid = pipe._unpack_latents(x, height, width).to(pipe.vae.dtype)
    mean, std = _statistics(pipe)
    grid = grid / (1 / std).to(grid) + mean.to(grid)  # by the reciprocal: rounded as the stock pipeline does
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0][:, :, 0], output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
    mean, std = (stat.to(grid) for stat in _statistics(pipe))
    grid = ((grid - mean) / std).squeeze(2)
    return pipe._pack_latents(grid, *grid.shape)


def _statistics(pipe: Any) -> tuple[Tensor, ...]:
    config = pipe.vae.config
    return tuple(torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))


def _grid(condition: Condition) -> tuple[int, int]:
    rows, columns = (int(v) + 1 for v in condition.shared["img_ids"][:, 1:].amax(0))
    return rows, columns


KREA2 = Family(
    name="krea2",
    generation="Krea2Pipeline",
    editing=None,
    lora_targets=r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
    guidance_off={"guidance_scale": 0.0},
    guidance_on=lambda scale: {"guidance_scale": scale - 1, "negative_prompt": ""},
    prompt_kwargs=TEXT,
    text_components=("text_encoder",),
    prompt_lengths=_lengths,
    token_side=_side,
    drawn=_drawn,
    grid=_grid,
    dummy_prompt=_dummy_prompt,
    split=_split,
    velocity=_velocity,
    sync_free=partial(_trimmed, multiple=BUCKET),
    decode=_decode,
    encode_images=_encode_images,
)
