"""The family `qwen-image`: Qwen-Image, Qwen-Image-Edit and Edit-Plus (2509, 2511); one transformer, packed tokens.

Prompts have as many tokens as they need: a condition always carries its mask, so rows of any length stack, and
where all rows are full the transformer is called without one, as the stock pipelines do. `img_shapes` says where the
target and the source lie, and is equal for all rows of a batch. An instruction is encoded together with its source, a
thousand tokens of Qwen2.5-VL, so the stock pipeline encodes each edit alone (Edit-Plus takes no batches at all).
Guidance keeps the length of the unguided velocity, token by token, and changes only its direction.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danceopd.common.tensors import compute_dtype

from ..condition import Condition
from ..family import Family, classifier_free

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT = ("encoder_hidden_states", "encoder_hidden_states_mask")
TRIMMED = "trimmed"  # a key of `Condition.fixed`, set once the text padding is trimmed
BUCKET = 32
"""For CUDA graphs, rows of unlike text lengths are padded to a multiple of this; the mask hides what is added."""


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    if hasattr(pipe, "processor"):
        return [0] * len(prompts)  # the editing pipelines cut nothing
    texts = [pipe.prompt_template_encode.format(prompt) for prompt in prompts]
    return [len(ids) - pipe.prompt_template_encode_start_idx for ids in pipe.tokenizer(texts)["input_ids"]]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, pipe.transformer.config.joint_attention_dim)
    text = torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)
    return {"prompt_embeds": text, "prompt_embeds_mask": torch.ones_like(text[..., 0], dtype=torch.long)}


def _size_of(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the call's area in the source's shape, multiples of 32 pixels, as in the stock pipelines."""
    ratio = image.width / image.height
    width = math.sqrt(call.get("height", 1024) * call.get("width", 1024) * ratio)
    return max(1, round(width / ratio / 32)) * 32, max(1, round(width / 32)) * 32


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, text, mask = call["hidden_states"], *(call[key] for key in TEXT)
    shapes = [list(shape) for shape in call["img_shapes"][0]]  # (frames, rows, columns) of tokens: target, source
    n = math.prod(shapes[0])
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    kwargs = {TEXT[0]: text, TEXT[1]: mask, "guidance": call["guidance"]}
    context = tokens[:, n:].clone() if tokens.shape[1] > n else None
    shape, fixed = tuple(tokens[:, :n].shape[1:]), {"img_shapes": shapes}
    return tokens[:, :n], Condition("qwen-image", shape, kwargs, context, fixed=fixed, ragged=TEXT)


def _trimmed(condition: Condition, multiple: int = 1) -> Condition:
    """The text cut to the longest row, without a mask where all rows are full.

    With a mask, the text is padded to a multiple of `multiple` tokens.
    """
    if TRIMMED in condition.fixed:
        return condition
    text, mask = (condition.kwargs[key] for key in TEXT)
    assert text is not None and mask is not None
    lengths = mask.sum(dim=1).tolist()
    longest, even = max(lengths), len(set(lengths)) == 1
    text, kept = text[:, :longest], None if even else mask[:, :longest]
    more = 0 if kept is None else -longest % multiple
    if more and kept is not None:
        text, kept = F.pad(text, (0, 0, 0, more)), F.pad(kept, (0, more))
    kwargs = {**condition.kwargs, TEXT[0]: text, TEXT[1]: kept}
    return replace(condition, kwargs=kwargs, fixed={**condition.fixed, TRIMMED: True})


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    condition = _trimmed(condition)
    text, mask = (condition.kwargs[key] for key in TEXT)
    tokens = x if condition.context is None else torch.cat([x, condition.context.to(x.dtype)], dim=1)
    out = transformer(
        hidden_states=tokens.to(compute_dtype(transformer.img_in)),
        timestep=(sigma * 1000).to(text.dtype) / 1000,  # type: ignore[union-attr]
        guidance=condition.kwargs["guidance"],
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[[tuple(shape) for shape in condition.fixed["img_shapes"]]] * len(x),
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]].float()


def _guide(v: Tensor, v_null: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Classifier-free guidance, then each token's velocity rescaled to the norm it has in `v`."""
    guided = classifier_free(v, v_null, scale)
    return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    grid = pipe._unpack_latents(x, height, width, pipe.vae_scale_factor).to(pipe.vae.dtype)
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    grid = grid / (1 / std).to(grid) + mean.to(grid)  # by the reciprocal: rounded as the stock pipelines do
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0][:, :, 0], output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    grid = ((grid - mean.to(grid)) / std.to(grid)).squeeze(2)
    return pipe._pack_latents(grid, *grid.shape)


QWEN_IMAGE = Family(
    name="qwen-image",
    generation="QwenImagePipeline",
    editing="QwenImageEditPipeline",
    other_editing=("QwenImageEditPlusPipeline",),
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
    guidance_off={"true_cfg_scale": 1.0},
    guidance_on=lambda scale: {"true_cfg_scale": scale, "negative_prompt": " "},
    guide=_guide,
    prompt_kwargs=TEXT,
    text_components=("text_encoder",),
    prompt_lengths=_lengths,
    references=lambda editing: 10 if "Plus" in editing else 1,
    shaped_by=-1,
    source_text=1337,  # a megapixel in patches of 28 pixels
    size_of=_size_of,
    grid=lambda condition: tuple(condition.fixed["img_shapes"][0][1:]),
    dummy_prompt=_dummy_prompt,
    split=_split,
    velocity=_velocity,
    sync_free=partial(_trimmed, multiple=BUCKET),
    decode=_decode,
    encode_images=_encode_images,
)
