"""One frozen dataclass a model family, in a registry; everything else in the package is family-free.

A family says which pipeline classes it has, which modules a LoRA adapts, how guidance is switched off, how
a recorded transformer call splits into latents, source tokens and the rest, how a velocity is read out of
the transformer, and how latents become pictures. Each is under 40 lines and is tested against its pipeline.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .record import Condition


@dataclass(frozen=True)
class Family:
    """What danceopd must know about one model family. `pipe` is always the stock diffusers pipeline."""

    name: str
    generation: str  # diffusers class that draws from a prompt
    editing: str  # diffusers class that edits a source image
    lora_targets: str  # PEFT full-match regex over module paths
    unguided: dict[str, Any]  # call kwargs that switch guidance off
    prompt_kwargs: tuple[str, ...]  # the transformer kwargs that hold the prompt (guidance replaces these)
    text_components: tuple[str, ...]  # what a pipeline no longer needs once its prompts are encoded
    smallest_source: int  # pixels a side
    prompt_lengths: Callable[[Any, list[str]], list[int]]  # (pipe, prompts) -> tokens each, untruncated
    encode: Callable[..., dict[str, Tensor]]  # (pipe, prompts, **call) -> call kwargs that stand for the prompts
    blank: Callable[[Any, int], dict[str, Tensor]]  # (pipe, rows) -> the same, needing no text encoder
    split: Callable[[dict[str, Any]], tuple[Tensor, Tensor | None, dict]]  # call -> latents, context, other kwargs
    velocity: Callable[[Any, Tensor, Tensor, Condition], Tensor]  # (transformer, x, sigma (B,), condition) -> v fp32
    decode: Callable[[Any, Tensor, int, int], list[Image]]  # (pipe, x, height, width) -> pictures


# FLUX.2 klein: one class for both tasks; packed tokens; source tokens follow the latents.


def _klein_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    texts = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for p in prompts
    ]
    return [len(ids) for ids in pipe.tokenizer(texts)["input_ids"]]


def _klein_encode(pipe: Any, prompts: list[str], **call: Any) -> dict[str, Tensor]:
    keys = ("max_sequence_length", "text_encoder_out_layers")
    return {"prompt_embeds": pipe.encode_prompt(prompts, **{k: call[k] for k in keys if k in call})[0]}


def _klein_blank(pipe: Any, rows: int) -> dict[str, Tensor]:
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, pipe.transformer.config.joint_attention_dim)
    return {"prompt_embeds": torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)}


def _klein_split(call: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict]:
    tokens, n = call["hidden_states"], int((call["img_ids"][0, :, 0] == 0).sum())  # T = 0 marks the target
    dropped = ("hidden_states", "timestep", "return_dict", "joint_attention_kwargs")
    rest = {key: value for key, value in call.items() if key not in dropped}
    return tokens[:, :n], tokens[:, n:].clone() if tokens.shape[1] > n else None, rest


def _klein_velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    dtype = transformer.x_embedder.weight.dtype
    tokens = x if condition.context is None else torch.cat([x, condition.context.to(x.dtype)], dim=1)
    time = (sigma * 1000).to(condition.kwargs["encoder_hidden_states"].dtype) / 1000  # type: ignore[union-attr]
    out = transformer(hidden_states=tokens.to(dtype), timestep=time, return_dict=False, **condition.kwargs)[0]
    return out[:, : x.shape[1]].float()


def _klein_decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    side = 2 * pipe.vae_scale_factor
    grid = x.to(pipe.vae.dtype).transpose(1, 2).unflatten(2, (height // side, width // side))
    mean, var = (s.view(1, -1, 1, 1).to(grid) for s in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    grid = pipe._unpatchify_latents(grid * torch.sqrt(var + pipe.vae.config.batch_norm_eps) + mean)
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0], output_type="pil")


FLUX2_KLEIN = Family(
    name="flux2-klein",
    generation="Flux2KleinPipeline",
    editing="Flux2KleinPipeline",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    unguided={"guidance_scale": 1.0},
    prompt_kwargs=("encoder_hidden_states", "txt_ids"),
    text_components=("text_encoder",),
    smallest_source=64,
    prompt_lengths=_klein_lengths,
    encode=_klein_encode,
    blank=_klein_blank,
    split=_klein_split,
    velocity=_klein_velocity,
    decode=_klein_decode,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX2_KLEIN,)}


def family_of(pipe_or_folder: Any) -> Family:
    """The family of a loaded pipeline, of a pipeline folder, or of a model on the hub.

    Read from the class name, or from `model_index.json`; no weights are loaded. UserError when there is no
    such file or when no family knows the class.
    """
    if isinstance(pipe_or_folder, str | Path):
        name, where = _class_name(pipe_or_folder), str(pipe_or_folder)
    else:
        name = where = type(pipe_or_folder).__name__
    for family in FAMILIES.values():
        if name in (family.generation, family.editing):
            return family
    known = sorted({cls for family in FAMILIES.values() for cls in (family.generation, family.editing)})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean a {near[0]}" if near else f"use one of {', '.join(known)}"
    raise UserError(f"{where} is a {name}, which danceopd does not know; {hint}")


def _class_name(folder: str | Path) -> str:
    index = Path(folder) / "model_index.json"
    try:
        if index.parent.exists():
            return json.loads(index.read_text())["_class_name"]
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.load_config(str(folder))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a diffusers pipeline ({type(error).__name__} at model_index.json); "
            f"give a folder that DiffusionPipeline.save_pretrained wrote, or a model's name on the hub"
        ) from error
