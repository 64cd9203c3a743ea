"""The family `z-image`: one transformer with two token layouts, basic for generation and omni for editing.

The layouts differ in token order, positions and in how captions are modulated, so on one transformer they give
different pictures of one prompt; a Condition whose `fixed` has "sources" is omni. The stock call takes unpadded
captions in lists. They are recorded padded, a row's segments one after the other, with the length of each segment;
source latents and SigLIP2 features are recorded as tokens, with their grids in `fixed`. The transformer's time runs
from 0 (noise) to 1, and its output is x0 − ε.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from danceopd.errors import UserError

from ..condition import Condition
from ..family import Family, in_multiples, latent_pairs

if TYPE_CHECKING:
    from PIL.Image import Image

LENGTHS, PADDING = "lengths", "cap_padding"  # set by _z_sync_free
MULTIPLE = 32  # tokens to which the transformer pads each segment


def _is_omni(pipe: Any) -> bool:
    return hasattr(pipe, "prepare_siglip_embeds")


def _reads_siglip(pipe: Any) -> bool:
    return pipe.transformer.config.siglip_feat_dim is not None


def _z_lengths(pipe: Any, prompts: list[str]) -> list[int]:
    if _is_omni(pipe):
        before, after = "<|vision_end|>", "<|vision_start|>"
        if _reads_siglip(pipe):  # generates as well, with a longer template
            before, after = "<|im_start|>user\n", ""
        texts = [f"{before}{prompt}<|im_end|>\n<|im_start|>assistant\n{after}" for prompt in prompts]
    else:
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        texts = [
            pipe.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True, enable_thinking=True)
            for t in turns
        ]
    return [len(ids) for ids in pipe.tokenizer(texts)["input_ids"]]


def _z_encode_prompts(pipe: Any, prompts: list[str], images: Any = None, **call: Any) -> list[dict[str, Any]]:
    settings = {key: call[key] for key in ("max_sequence_length",) if key in call}
    if _is_omni(pipe):
        settings["num_condition_images"] = 0 if images is None else len(images[0])
    # A copy of the prompts: the stock method writes its templates into the caller's list.
    rows = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **settings)[0]
    return [{"prompt_embeds": [row]} for row in rows]


def _z_dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    caption = torch.zeros(1, pipe.transformer.config.cap_feat_dim, device=pipe._execution_device)
    return {"prompt_embeds": [[caption] if _is_omni(pipe) else caption] * rows}


def _z_split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    omni = isinstance(call["x"][0], list)
    pictures = [row if omni else [row] for row in call["x"]]  # (C, 1, h, w) each; the target is the last of a row
    captions = [row if omni else [row] for row in call["cap_feats"]]
    latents = torch.stack([row[-1] for row in pictures]).squeeze(2)
    device = captions[0][0].device
    kwargs: dict[str, Tensor | None] = {
        "cap_feats": pad_sequence([torch.cat(row) for row in captions], batch_first=True),
        "cap_lengths": torch.tensor([[len(segment) for segment in row] for row in captions], device=device),
    }
    fixed, context = {}, None
    if omni:
        fixed["sources"] = [list(source.shape[2:]) for source in pictures[0][:-1]]
        if fixed["sources"]:
            context = torch.stack([torch.cat([s.flatten(1).T for s in row[:-1]]) for row in pictures])
        if call["siglip_feats"][0] is not None:
            features = [row[:-1] for row in call["siglip_feats"]]  # the last is the target's: None
            fixed["siglip"] = [list(grid.shape[:2]) for grid in features[0]]
            kwargs["siglip_feats"] = torch.stack([torch.cat([f.flatten(0, 1) for f in row]) for row in features])
    return latents, Condition("z-image", tuple(latents.shape[1:]), kwargs, context, {}, fixed, ("cap_feats",))


def _z_fit_prompt(other: Condition, condition: Condition) -> Condition:
    """A null prompt that was recorded with two sources, for as many as `condition` has.

    A caption has a segment before the first source, one between each two, the prompt, and the end.
    """
    count, lengths = len(condition.fixed.get("sources", ())), other.kwargs["cap_lengths"]
    assert lengths is not None
    if count == 0 or lengths.shape[1] != 4:
        return other
    rows = zip(other.kwargs["cap_feats"], lengths.tolist(), strict=True)  # type: ignore[arg-type]
    split = [row[: sum(parts)].split(parts) for row, parts in rows]
    segments = [[first, *[between] * (count - 1), prompt, end] for first, between, prompt, end in split]
    kwargs: dict[str, Tensor | None] = {
        "cap_feats": pad_sequence([torch.cat(row) for row in segments], batch_first=True),
        "cap_lengths": lengths[:, [0, *[1] * (count - 1), 2, 3]],
    }
    return replace(other, kwargs={**other.kwargs, **kwargs})


def _z_velocity(transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    dtype, sources = transformer.x_pad_token.dtype, condition.fixed.get("sources")
    lengths: list[list[int]] = condition.fixed.get(LENGTHS) or condition.kwargs["cap_lengths"].tolist()  # type: ignore[union-attr]
    rows = zip(condition.kwargs["cap_feats"], lengths, strict=True)  # type: ignore[arg-type]
    captions: list[Any] = [list(row[: sum(parts)].split(parts)) for row, parts in rows]
    if len(captions[0]) != (len(sources) + 2 if sources else 1):
        raise ValueError("the captions are of another layout; record the null prompt as the prompt was, with a source")
    pictures: list[Any] = list(x.to(dtype).unsqueeze(2))
    omni: dict[str, Any] = {}
    if sources is None:
        captions = [row[0] for row in captions]
    else:
        clean = _grids(condition.context, sources, len(x))
        pictures = [[*(s.permute(2, 0, 1).unsqueeze(1).to(dtype) for s in c), p] for c, p in zip(clean, pictures)]
        seen = _grids(condition.kwargs.get("siglip_feats"), condition.fixed.get("siglip", []), len(x))
        omni["siglip_feats"] = [[*features, None] if features else None for features in seen]
        omni["image_noise_mask"] = [[0] * len(sources) + [1]] * len(x)
    time = (1000 - sigma * 1000) / 1000
    padding = condition.kwargs.get(PADDING)
    with nullcontext() if padding is None else _padded(transformer, padding, lengths):
        out = transformer(pictures, time, captions, return_dict=False, **omni)[0]
    return -torch.stack([row.float() for row in out]).squeeze(2)


def _z_sync_free(condition: Condition) -> Condition:
    """The condition with its segments' lengths in `fixed`; those of basic captions rounded up as the transformer does.

    The transformer puts its own pad token after the end of a caption; `_padded` does that here. Omni positions continue
    from the exact lengths, so those stay.
    """
    feats, counts = condition.kwargs["cap_feats"], condition.kwargs["cap_lengths"]
    assert feats is not None and counts is not None
    lengths: list[list[int]] = counts.tolist()
    if "sources" in condition.fixed:
        return replace(condition, fixed={**condition.fixed, LENGTHS: lengths})
    padded = [[-(-n // MULTIPLE) * MULTIPLE for n in row] for row in lengths]
    longest = max(map(sum, padded))
    feats = F.pad(feats, (0, 0, 0, max(0, longest - feats.shape[1])))[:, :longest]
    padding = torch.arange(longest, device=feats.device) >= counts
    kwargs = {**condition.kwargs, "cap_feats": feats, PADDING: padding}
    return replace(condition, kwargs=kwargs, fixed={**condition.fixed, LENGTHS: padded})


@contextmanager
def _padded(transformer: Any, padding: Tensor, lengths: list[list[int]]) -> Iterator[None]:
    """A context in which embedded captions have the transformer's pad token where `padding (B, m)` is True."""
    hidden = torch.cat([row[: sum(parts)] for row, parts in zip(padding, lengths, strict=True)])[:, None]

    def put(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        return torch.where(hidden, transformer.cap_pad_token, embedded)

    handle = transformer.cap_embedder.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _grids(tokens: Tensor | None, sizes: list[list[int]], rows: int) -> list[list[Tensor]]:
    """Each row's tokens `(m, C)` split into pictures `(h, w, C)`; empty lists where there are no tokens."""
    if tokens is None:
        return [[] for _ in range(rows)]
    parts = (row.split([prod(size) for size in sizes]) for row in tokens)
    return [[part.unflatten(0, tuple(size)) for part, size in zip(row, sizes, strict=True)] for row in parts]


def _z_decode(pipe: Any, x: Tensor, height: int, width: int) -> list[Image]:
    latents = x.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


def _no_siglip(images: Any, batch_size: int, device: Any, dtype: Any) -> list[list[Tensor]]:
    return [[] for _ in range(batch_size)]


def _z_prepare_editing(pipe: Any) -> Any:
    """An omni pipeline that can edit, over the same transformer.

    A transformer without SigLIP2 layers (Z-Image, Z-Image-Turbo) edits from source latents alone. The stock class
    gives sources to its VAE in bfloat16, whatever the VAE is, so a VAE of another dtype is copied.
    """
    without_siglip = not _reads_siglip(pipe)
    if not without_siglip and (pipe.siglip is None or pipe.siglip_processor is None):
        raise UserError(
            "the transformer reads SigLIP2 features and its pipeline has no siglip; set editing_base to the folder or "
            "the hub name of a ZImageOmniPipeline that has it"
        )
    replaced = pipe.__dict__.get("prepare_siglip_embeds") is _no_siglip
    cast = pipe.vae is not None and pipe.vae.dtype != torch.bfloat16
    if not cast and without_siglip == replaced:
        return pipe
    ready = copy.copy(pipe)
    if cast:
        ready.vae = copy.deepcopy(pipe.vae).bfloat16()
    if without_siglip:
        ready.prepare_siglip_embeds = _no_siglip
    return ready


def _z_encode_images(pipe: Any, pixels: Tensor) -> Tensor:
    latents = pipe.vae.encode(pixels).latent_dist.mode().float()
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


Z_IMAGE = Family(
    name="z-image",
    generation="ZImagePipeline",
    editing="ZImageOmniPipeline",
    lora_targets=r"(layers|noise_refiner|context_refiner|siglip_refiner)\.\d+"
    r"\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    guidance_off={"guidance_scale": 0.0},
    guidance_on=lambda scale: {"guidance_scale": scale - 1},  # stock: v + s (v − v_null), off where s is 0 or less
    prompt_kwargs=("cap_feats", "cap_lengths"),
    text_components=("text_encoder",),
    optional=("siglip", "siglip_processor"),
    prepare_editing=_z_prepare_editing,
    editing_generates=_reads_siglip,
    references=lambda editing: 10,
    drawn=in_multiples(latent_pairs),
    prompt_lengths=_z_lengths,
    encode_prompts=_z_encode_prompts,
    fit_prompt=_z_fit_prompt,
    dummy_prompt=_z_dummy_prompt,
    split=_z_split,
    velocity=_z_velocity,
    sync_free=_z_sync_free,
    decode=_z_decode,
    encode_images=_z_encode_images,
)
