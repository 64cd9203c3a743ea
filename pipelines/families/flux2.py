"""The families `flux2-klein`, `flux2-klein-kv` and `flux2-dev`: packed tokens, one pipeline class for both tasks.

klein (4B and 9B, base and distilled) encodes prompts with Qwen3 and is guided by two calls, the distilled ones not at
all; dev encodes them with Mistral and takes guidance as a number (`guidance_scale`, 4 unless the recipe sets it). A
source's tokens follow the latents. klein KV (9B, distilled) is klein with source tokens that come first, attend to
themselves alone and are modulated at time 0: their keys and values are the same at every step, and may be kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype
from danceopd.errors import UserError

from ..condition import Condition
from ..family import Family, grid_from_ids

if TYPE_CHECKING:
    from PIL.Image import Image


def _klein_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    texts = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for p in prompts
    ]
    return [len(ids) for ids in pipe.tokenizer(texts)["input_ids"]]


def _dev_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    chats = format_input(prompts, system_message=pipe.system_message)
    return [len(ids) for ids in pipe.tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]]


def _encode_prompts(pipe: Any, prompts: list[str], images: Any = None, **call: Any) -> list[dict[str, Any]]:
    keys = ("max_sequence_length", "text_encoder_out_layers")
    embeds = pipe.encode_prompt(prompts, **{k: call[k] for k in keys if k in call})[0]
    return [{"prompt_embeds": row} for row in embeds.split(1)]


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, pipe.transformer.config.joint_attention_dim)
    return {"prompt_embeds": torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)}


def _split(family: str, call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, n = call["hidden_states"], int((call["img_ids"][0, :, 0] == 0).sum())  # T = 0 marks the target
    dropped = ("hidden_states", "timestep", "return_dict", "joint_attention_kwargs")
    rest = {key: value for key, value in call.items() if key not in dropped}
    context = tokens[:, n:].clone() if tokens.shape[1] > n else None
    return tokens[:, :n], Condition(family, tuple(tokens[:, :n].shape[1:]), rest, context)


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    dtype = compute_dtype(transformer.x_embedder)
    tokens = x if condition.context is None else torch.cat([x, condition.context.to(x.dtype)], dim=1)
    time = (sigma * 1000).to(condition.kwargs["encoder_hidden_states"].dtype) / 1000  # type: ignore[union-attr]
    out = transformer(hidden_states=tokens.to(dtype), timestep=time, return_dict=False, **condition.kwargs)[0]
    return out[:, : x.shape[1]].float()


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    side = 2 * pipe.vae_scale_factor
    grid = x.to(pipe.vae.dtype).transpose(1, 2).unflatten(2, (height // side, width // side))
    mean, var = (s.view(1, -1, 1, 1).to(grid) for s in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    grid = pipe._unpatchify_latents(grid * torch.sqrt(var + pipe.vae.config.batch_norm_eps) + mean)
    return pipe.image_processor.postprocess(pipe.vae.decode(grid, return_dict=False)[0], output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode()).float()
    mean, var = (s.view(1, -1, 1, 1).to(grid) for s in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    return ((grid - mean) / torch.sqrt(var + pipe.vae.config.batch_norm_eps)).flatten(2).transpose(1, 2)


FLUX2_KLEIN = Family(
    name="flux2-klein",
    generation="Flux2KleinPipeline",
    editing="Flux2KleinPipeline",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    prompt_kwargs=("encoder_hidden_states", "txt_ids"),
    text_components=("text_encoder",),
    references=lambda editing: 10,
    smallest_source=64,
    grid=lambda condition: grid_from_ids(condition.kwargs["img_ids"][0], condition.shape[0]),  # type: ignore[index]
    prompt_lengths=_klein_lengths,
    encode_prompts=_encode_prompts,
    dummy_prompt=_dummy_prompt,
    split=partial(_split, "flux2-klein"),
    velocity=_velocity,
    decode=_decode,
    encode_images=_encode_images,
)


FLUX2_DEV = replace(
    FLUX2_KLEIN,
    name="flux2-dev",
    generation="Flux2Pipeline",
    editing="Flux2Pipeline",
    guidance_off={},
    guidance_on=None,
    call=("max_sequence_length", "guidance_scale"),
    prompt_lengths=_dev_lengths,
    split=partial(_split, "flux2-dev"),
)


# klein KV

# Condition kwargs with the keys and values of the source: kept.k.0, kept.v.0, kept.k.1, … in the order of the blocks
KEPT = "kept"


def _kv_split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    m = call.get("num_ref_tokens", 0)
    tokens, dropped = call["hidden_states"], ("kv_cache", "kv_cache_mode", "num_ref_tokens")
    rest = {key: value for key, value in call.items() if key not in dropped}
    x, condition = _split("flux2-klein-kv", {**rest, "hidden_states": tokens[:, m:], "img_ids": rest["img_ids"][:, m:]})
    kwargs = {**condition.kwargs, "img_ids": rest["img_ids"]}
    return x, replace(condition, kwargs=kwargs, context=tokens[:, :m].clone() if m else None)


def _kv_velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    kept = {key: value for key, value in condition.kwargs.items() if key.startswith(KEPT)}
    if condition.context is None and not kept:
        return _velocity(transformer, x, sigma, condition)
    _causal(transformer)
    call: dict[str, Any] = {key: value for key, value in condition.kwargs.items() if key not in kept}
    time = (sigma * 1000).to(call["encoder_hidden_states"].dtype) / 1000
    dtype = compute_dtype(transformer.x_embedder)
    if condition.context is None:
        cache = _cache(transformer, kept)
        call |= {"hidden_states": x.to(dtype), "kv_cache": cache, "kv_cache_mode": "cached"}
    else:
        tokens = torch.cat([condition.context.to(x.dtype), x], dim=1).to(dtype)
        call |= {"hidden_states": tokens, "kv_cache_mode": "extract", "num_ref_tokens": condition.context.shape[1]}
    return transformer(timestep=time, return_dict=False, **call)[0].float()


def _causal(transformer: Any) -> None:
    """UserError unless the attention keeps source tokens to themselves, as the stock class sets it up."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        processor = block.attn.processor
        if not type(getattr(processor, "stock", processor)).__name__.startswith("Flux2KV"):
            raise UserError(
                f"{type(processor).__name__} lets source tokens attend to the picture, which FLUX.2-klein KV was not "
                "trained for; load the base as a Flux2KleinKVPipeline"
            )


def _cache(transformer: Any, kept: dict[str, Tensor | None]) -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))
    for i, layer in enumerate((*cache.double_block_caches, *cache.single_block_caches)):
        layer.store(kept[f"{KEPT}.k.{i}"], kept[f"{KEPT}.v.{i}"])
    cache.num_ref_tokens = cache.get_double(0).k_ref.shape[1]
    return cache


@torch.no_grad()
def _kv_keep(transformer: Any, condition: Condition) -> Condition:
    """The source's keys and values of every block in place of its tokens, from one forward of the source.

    The forward also gets one text token and one latent token, since it needs some; the source does not attend to them.
    """
    if condition.context is None:
        return condition
    _causal(transformer)
    source, call = condition.context, condition.kwargs
    m, dtype = source.shape[1], compute_dtype(transformer.x_embedder)
    text, ids, text_ids = (call[key] for key in ("encoder_hidden_states", "img_ids", "txt_ids"))
    assert text is not None and ids is not None and text_ids is not None
    cache = transformer(
        hidden_states=torch.cat([source, source[:, :1]], dim=1).to(dtype),
        encoder_hidden_states=text[:, :1],
        timestep=torch.zeros(len(source), dtype=text.dtype, device=text.device),
        img_ids=ids[:, : m + 1],
        txt_ids=text_ids[:, :1],
        guidance=call["guidance"],
        return_dict=False,
        kv_cache_mode="extract",
        num_ref_tokens=m,
    )[1]
    kept: dict[str, Tensor | None] = {}
    for i, layer in enumerate((*cache.double_block_caches, *cache.single_block_caches)):
        kept[f"{KEPT}.k.{i}"], kept[f"{KEPT}.v.{i}"] = layer.get()
    return replace(condition, context=None, kwargs={**call, "img_ids": ids[:, m:], **kept})


def _kv_grid(condition: Condition) -> tuple[int, int] | None:
    ids = condition.kwargs["img_ids"]
    assert ids is not None
    return grid_from_ids(ids[0, ids.shape[1] - condition.shape[0] :], condition.shape[0])


FLUX2_KLEIN_KV = replace(
    FLUX2_KLEIN,
    name="flux2-klein-kv",
    generation="Flux2KleinKVPipeline",
    editing="Flux2KleinKVPipeline",
    guidance_off={},
    guidance_on=None,
    split=_kv_split,
    velocity=_kv_velocity,
    cache_source=_kv_keep,
    grid=_kv_grid,
)
