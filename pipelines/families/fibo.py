"""The family `bria-fibo`: Bria FIBO and FIBO-Edit, two pipeline classes over one transformer class.

Prompts are JSON, of edits with the key "edit_instruction"; an instruction in plain words becomes that JSON. Every block
of the transformer reads another layer of the text encoder, so a prompt is a list of layers; those that are the same
tensor are kept once. Text has no positions, so its tokens can be reordered and padded under a mask. A latent is a
token. Sources keep their own sizes up to a megapixel, follow the latents, and carry 1, 2, … in the first position.
The stock pipelines take no prompt embeddings, so recording puts zeros in place of the encoder's states where no text is
needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danceopd.common.tensors import compute_dtype
from danceopd.errors import UserError

from ..condition import Condition, joined_layers, split_layers
from ..family import Family, grid_from_ids, in_multiples
from .qwen import BUCKET

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT, LAYERS, MASK = "encoder_hidden_states", "text_encoder_layers", "text_mask"
PLACES = "layers"  # a key of `Condition.fixed`: which of the kept layers each block reads
TRIMMED = "trimmed"  # a key of `Condition.fixed`, set once the text padding is trimmed
INSTRUCTION = "edit_instruction"


class _NoText(str):
    """A prompt in whose place zeros are recorded."""


def _prompt(prompt: str, editing: bool) -> str:
    """The prompt; of an edit, as JSON with an instruction."""
    if not editing:
        return prompt
    if not prompt.lstrip().startswith("{"):
        return json.dumps({INSTRUCTION: prompt}, ensure_ascii=False)
    try:
        if INSTRUCTION in json.loads(prompt):
            return prompt
        reason = f"has no {INSTRUCTION}"
    except ValueError as error:
        reason = f"is broken ({error})"
    raise UserError(f'is JSON that {reason}; write {{"{INSTRUCTION}": "make it red"}}, or plain words')


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    return [len(ids) for ids in pipe.tokenizer(prompts)["input_ids"]]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    return {"prompt": [_NoText("{}")] * rows}


def _prepare_recording(pipe: Any) -> None:
    """Zeros in place of states where no text is needed, and null prompts that are no JSON."""
    encode, check, config = pipe.encode_prompt, pipe.check_inputs, pipe.transformer.config

    def encode_prompt(prompt: Any, **how: Any) -> tuple[Any, ...]:
        if not isinstance(prompt, list) or not isinstance(prompt[0], _NoText):
            return encode(prompt=prompt, **how)
        like = {"device": pipe._execution_device, "dtype": pipe.transformer.dtype}
        text, layer, ids = (
            torch.zeros(len(prompt), 1, width, **like)
            for width in (config.joint_attention_dim, config.text_encoder_dim, 3)
        )
        return text, None, ids, torch.ones_like(text[..., 0]), None, [layer], None

    def check_inputs(**given: Any) -> None:
        if "references" in given:  # the editing class; `prompt` has seen to what is no null prompt
            given["prompt"] = json.dumps({INSTRUCTION: ""})
        check(**given)

    pipe.encode_prompt, pipe.check_inputs = encode_prompt, check_inputs


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, n = call["hidden_states"], int((call["img_ids"][:, 0] == 0).sum())
    text, (layers, places) = call[TEXT], joined_layers(call[LAYERS])
    mask = (call.get("joint_attention_kwargs") or {}).get("attention_mask")
    mask = torch.ones_like(text[..., 0], dtype=torch.bool) if mask is None else mask[:, 0, 0, : text.shape[1]]
    order = mask.int().argsort(dim=1, descending=True, stable=True)[..., None]  # padding comes last
    kwargs = {
        TEXT: text.take_along_dim(order, 1),
        LAYERS: layers.take_along_dim(order[..., None], 1),
        MASK: mask.take_along_dim(order[..., 0], 1),
    }
    context = tokens[:, n:].clone() if tokens.shape[1] > n else None
    shape, shared = tuple(tokens[:, :n].shape[1:]), {"img_ids": call["img_ids"]}
    fixed = {PLACES: places}
    return tokens[:, :n], Condition("bria-fibo", shape, kwargs, context, shared, fixed, (TEXT, LAYERS, MASK))


def _trimmed(condition: Condition, multiple: int = 1) -> Condition:
    """The text cut to the longest row, without a mask where all rows are full.

    With a mask, the text is padded to a multiple of `multiple` tokens.
    """
    if TRIMMED in condition.fixed:
        return condition
    mask = condition.kwargs[MASK]
    assert mask is not None
    lengths = mask.sum(dim=1).tolist()
    even = len(set(lengths)) == 1
    more = 0 if even else -max(lengths) % multiple
    kwargs: dict[str, Tensor | None] = {}
    for key, value in condition.kwargs.items():
        assert value is not None
        kwargs[key] = F.pad(value[:, : max(lengths)], (0, 0) * (value.ndim - 2) + (0, more))
    if even:
        kwargs[MASK] = None
    return replace(condition, kwargs=kwargs, fixed={**condition.fixed, TRIMMED: True})


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    condition = _trimmed(condition)
    text, layers, mask = (condition.kwargs[key] for key in (TEXT, LAYERS, MASK))
    assert text is not None and layers is not None
    tokens = x if condition.context is None else torch.cat([x, condition.context.to(x.dtype)], dim=1)
    ids, how = condition.shared["img_ids"], {}
    if mask is not None:
        seen = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        how["attention_mask"] = seen[:, None, None, :]
    out = transformer(
        hidden_states=tokens.to(compute_dtype(transformer.x_embedder)),
        timestep=(sigma * 1000).to(text.dtype),
        encoder_hidden_states=text,
        text_encoder_layers=split_layers(layers, condition.fixed[PLACES]),
        joint_attention_kwargs=how,
        txt_ids=ids.new_zeros(text.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]].float()


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    grid = pipe._unpack_latents_no_patch(x.to(pipe.vae.dtype), height, width, pipe.vae_scale_factor).unsqueeze(2)
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    grid = grid / (1 / std).to(grid) + mean.to(grid)  # by the reciprocal: rounded as the stock pipelines do
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0].squeeze(2), output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0].float()
    mean, std = (torch.tensor(pipe.vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    return pipe._pack_latents_no_patch((grid - mean.to(grid)) / std.to(grid), *grid.shape)


BRIA_FIBO = Family(
    name="bria-fibo",
    generation="BriaFiboPipeline",
    editing="BriaFiboEditPipeline",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    prompt_kwargs=(TEXT, LAYERS, MASK),
    text_components=("text_encoder",),
    prompt=_prompt,
    prompt_lengths=_lengths,
    dummy_prompt=_dummy_prompt,
    prepare_recording=_prepare_recording,
    token_side=lambda pipe: pipe.vae_scale_factor,
    drawn=in_multiples(lambda pipe: max(16, pipe.vae_scale_factor)),
    references=lambda pipe: 10,
    grid=lambda condition: grid_from_ids(condition.shared["img_ids"], condition.shape[0]),
    split=_split,
    velocity=_velocity,
    sync_free=partial(_trimmed, multiple=BUCKET),
    decode=_decode,
    encode_images=_encode_images,
)
