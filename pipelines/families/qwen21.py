"""The family `qwen-image-2.1`: one class for both tasks, one stream of tokens, pictures with an alpha channel.

The tokens of a prompt come first and those of the picture last; an edit's sources stand among the prompt's, where
Qwen3-VL had reserved a slot for every two by two of their tokens. Attention is causal but inside a picture, and all
before the picture is modulated at time 0, so its keys and values are the same at every step: the stock pipeline keeps
them in a cache, which here is `cache_source`. `slots` (runs of places in the prompt) and `img_shapes` are equal for all
rows of a batch.

The stock forward counts the padding behind a short prompt as places before the picture, so a batch of unlike prompts
would not give what each prompt gives alone; `_own_places` counts each row's own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danceopd.common.tensors import compute_dtype
from danceopd.errors import UserError

from ..condition import Condition
from ..family import Family
from .flux2 import KEPT

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT = ("encoder_hidden_states", "encoder_hidden_states_mask")
PREFIX = "prefix"  # a key of `Condition.fixed`: the prompt's tokens in the kept keys and values
SLOT = 4  # tokens of a source for each of its slots in the prompt


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, pipe.transformer.config.context_in_dim)
    return {"prompt_embeds": torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)}


def _size_of(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the call's area in the source's shape, in pairs of tokens, as the stock pipeline rounds."""
    ratio, side = image.width / image.height, 2 * pipe.vae_scale_factor
    width = math.sqrt(call.get("height", 1024) * call.get("width", 1024) * ratio)
    return max(1, round(width / ratio / side)) * side, max(1, round(width / side)) * side


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, text, mask = call["hidden_states"], *(call[key] for key in TEXT)
    shapes = [list(shape) for shape in call["img_shapes"][0]]  # (frames, rows, columns): sources, then the picture
    m = sum(math.prod(shape) for shape in shapes[:-1])
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    fixed = {"img_shapes": shapes, "slots": _runs(call["img_mask"][0, : text.shape[1]].tolist())}
    context = tokens[:, :m].clone() if m else None
    shape = tuple(tokens[:, m:].shape[1:])
    kwargs: dict[str, Tensor | None] = {TEXT[0]: text, TEXT[1]: mask}
    return tokens[:, m:], Condition("qwen-image-2.1", shape, kwargs, context, fixed=fixed, ragged=TEXT)


def _runs(slots: list[bool]) -> list[list[int]]:
    """Where the True are: the first place and the number of each run."""
    found, at = [], 0
    for value, run in groupby(slots):
        count = len(list(run))
        found += [[at, count]] if value else []
        at += count
    return found


def _velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    kept = {key: value for key, value in condition.kwargs.items() if key.startswith(KEPT)}
    call, lengths = _prompt(condition)
    if kept:
        call |= {"kv_cache": _cache(transformer, kept), "kv_cache_mode": "cached"}
    return _run(transformer, x, sigma, condition, call, lengths)[:, -x.shape[1] :].float()


def _prompt(condition: Condition) -> tuple[dict[str, Any], list[int]]:
    """The prompt's arguments, cut to the longest row, without a mask where all rows are full; tokens of each row."""
    text, mask = (condition.kwargs[key] for key in TEXT)
    assert text is not None and mask is not None
    lengths = mask.sum(dim=1).tolist()
    longest = condition.fixed.get(PREFIX) or max(lengths)
    full = min(lengths) == longest
    return {TEXT[0]: text[:, :longest], TEXT[1]: None if full else mask[:, :longest]}, lengths


def _run(
    transformer: Any, x: Tensor, sigma: Tensor, condition: Condition, call: dict[str, Any], lengths: list[int]
) -> Tensor:
    """The transformer's output for the picture `x`, and for its sources where they are computed."""
    text, shapes = call[TEXT[0]], condition.fixed["img_shapes"]
    tokens = x if condition.context is None else torch.cat([condition.context.to(x.dtype), x], dim=1)
    slots = torch.zeros(1, text.shape[1] + math.prod(shapes[-1]) // SLOT, dtype=torch.bool, device=x.device)
    for first, count in (*condition.fixed["slots"], [text.shape[1], slots.shape[1]]):
        slots[:, first : first + count] = True
    with _own_places(transformer.pos_embed, x.shape[1], lengths, text.shape[1], condition.fixed):
        return transformer(
            hidden_states=tokens.to(compute_dtype(transformer.img_in)),
            timestep=(sigma * 1000).to(text.dtype) / 1000,
            img_shapes=[[tuple(shape) for shape in shapes]] * len(x),
            img_mask=slots,
            return_dict=False,
            **call,
        )[0]


@dataclass(frozen=True)
class _RowTables:
    """Rotary tables (B, tokens, D) where the stock processors expect one (tokens, D) for all rows."""

    rows: Tensor

    def unsqueeze(self, dim: int) -> Tensor:
        """(B, tokens, 1, D), which multiplies heads (B, tokens, heads, D)."""
        return self.rows.unsqueeze(2)

    def __getitem__(self, tokens: slice) -> _RowTables:
        return _RowTables(self.rows[:, tokens])


@contextmanager
def _own_places(embed: Any, n: int, lengths: list[int], longest: int, fixed: dict[str, Any]) -> Iterator[None]:
    """A context in which the picture's `n` tokens of each row stand behind its own prompt of `lengths` tokens."""
    if min(lengths) == longest:
        yield
        return
    slots = sum(count for _, count in fixed["slots"])
    sources = sum(max(shape[1:]) for shape in fixed["img_shapes"][:-1])

    def put(module: Any, inputs: Any, table: Tensor) -> _RowTables:
        frames = module.freqs[0][torch.tensor(lengths, device=table.device) - slots + sources]
        rows = table.repeat(len(lengths), 1, 1)
        rows[:, -n:, : frames.shape[1]] = frames[:, None]
        return _RowTables(rows)

    handle = embed.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _cache(transformer: Any, kept: dict[str, Tensor | None] | None = None) -> Any:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(len(transformer.transformer_blocks))
    for i, layer in enumerate(cache.layer_caches if kept else ()):
        layer.store(kept[f"{KEPT}.k.{i}"], kept[f"{KEPT}.v.{i}"])  # type: ignore[index]
    return cache


@torch.no_grad()
def _keep(transformer: Any, condition: Condition) -> Condition:
    """The condition with the keys and values of its prompt and sources in every block, from one forward of them.

    The forward also gets a picture of four tokens, since it needs one; nothing before the picture attends to it. The
    sources' tokens stay, since the stock forward takes them in any case, and drops them.
    """
    if condition.context is None:
        return condition
    if not transformer.config.causal_condition:
        raise UserError(
            "rollout.cache_source: this base reads a source at the picture's time (causal_condition is false), so its "
            "keys and values change at every step; leave it out"
        )
    (call, lengths), cache, x = _prompt(condition), _cache(transformer), condition.context[:, :SLOT]
    shapes = [*condition.fixed["img_shapes"][:-1], [1, 2, 2]]
    small, time = replace(condition, fixed={**condition.fixed, "img_shapes": shapes}), torch.zeros(len(x)).to(x)
    _run(transformer, x, time, small, {**call, "kv_cache": cache, "kv_cache_mode": "extract"}, lengths)
    kept: dict[str, Tensor | None] = {}
    for i, layer in enumerate(cache.layer_caches):
        kept[f"{KEPT}.k.{i}"], kept[f"{KEPT}.v.{i}"] = layer.get()
    fixed = {**condition.fixed, PREFIX: call[TEXT[0]].shape[1]}
    return replace(condition, kwargs={**condition.kwargs, **kept}, fixed=fixed)


def _decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    grid = pipe._unpack_latents(x, height, width, pipe.vae_scale_factor).to(pipe.vae.dtype)
    mean, std = (stat.to(grid) for stat in _statistics(pipe))
    pixels = pipe.vae.decode(grid * std + mean, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def _encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    grid = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().float()
    mean, std = (stat.to(grid) for stat in _statistics(pipe))
    return ((grid - mean) / std).squeeze(2).flatten(2).transpose(1, 2)


def _statistics(pipe: Any) -> tuple[Tensor, ...]:
    config = pipe.vae.config
    return tuple(torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))


QWEN_IMAGE_21 = Family(
    name="qwen-image-2.1",
    generation="QwenImage21Pipeline",
    editing="QwenImage21Pipeline",
    lora_targets=r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|img_mlp\.(proj|gate_layer|out))",
    guidance_off={"true_cfg_scale": 1.0},
    guidance_on=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ""},
    prompt_kwargs=TEXT,
    text_components=("text_encoder",),
    call=("output_resolution",),
    prompt_lengths=lambda pipe, prompts: [0] * len(prompts),  # nothing is cut
    dummy_prompt=_dummy_prompt,
    references=lambda editing: 10,
    shaped_by=-1,
    alpha=True,
    source_text=1024,  # a slot for every 32 by 32 pixels of a megapixel
    token_side=lambda pipe: pipe.vae_scale_factor,
    size_of=_size_of,
    grid=lambda condition: tuple(condition.fixed["img_shapes"][-1][1:]),
    split=_split,
    velocity=_velocity,
    cache_source=_keep,
    sync_free=None,  # the stock forward reads the layout of its tokens back from the device
    decode=_decode,
    encode_images=_encode_images,
)
