"""The family `longcat-image`: LongCat-Image and LongCat-Image-Edit, two pipeline classes over one transformer class.

Packed tokens; a source's tokens follow the latents and carry 2 in their first position, the picture's 1. A prompt is
always padded to 512 tokens, an instruction is encoded together with its source, so the stock editing pipeline takes one
at a time; quoted text is read letter by letter. The editing pipeline takes no size: it draws a megapixel in the shape
of the source. The generation pipeline rewrites prompts with its text encoder unless it is told not to, as here.
Guidance of generation keeps each token's velocity from growing; that of editing does not.
The pipelines cannot load a LoRA; their transformer can (`pipe.transformer.load_lora_adapter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..condition import Condition
from ..family import Family, classifier_free
from .flux1 import decode, encode_images, velocity

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = 1  # in the first position of the picture's tokens


def _lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt as the stock pipelines count them: quoted text letter by letter, without the template."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

    lengths = []
    for prompt in prompts:
        parts = [list(text) if quoted else [text] for text, quoted in split_quotation(prompt)]
        texts = [text for part in parts for text in part]
        ids = pipe.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        lengths.append(sum(map(len, ids)))
    return lengths


def _dummy_prompt(pipe: Any, rows: int, **call: Any) -> dict[str, Any]:
    like = pipe.transformer if pipe.text_encoder is None else pipe.text_encoder
    size = (rows, 1, pipe.transformer.config.joint_attention_dim)
    return {"prompt_embeds": torch.zeros(size, device=pipe._execution_device, dtype=like.dtype)}


def _prepare_recording(pipe: Any) -> None:
    """The stock `encode_prompt` counts prompts also where it is given embeddings in their place."""
    stock = pipe.encode_prompt

    def encode_prompt(prompt: Any = None, prompt_embeds: Tensor | None = None, **how: Any) -> Any:
        counted = [""] * len(prompt_embeds) if prompt is None and prompt_embeds is not None else prompt
        return stock(prompt=counted, prompt_embeds=prompt_embeds, **how)

    pipe.encode_prompt = encode_prompt


def _extra(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {"enable_prompt_rewrite": False} if type(pipe).__name__ == "LongCatImagePipeline" else {}


def _size_of(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """The (height, width) that the stock pipeline draws: a megapixel in the source's shape, whatever the call's."""
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock

    width, height = stock.calculate_dimensions(1024 * 1024, image.width / image.height)
    return height, width


def _split(call: dict[str, Any]) -> tuple[Tensor, Condition]:
    tokens, n = call["hidden_states"], int((call["img_ids"][:, 0] == PICTURE).sum())
    rows = {"encoder_hidden_states": call["encoder_hidden_states"]}
    shared = {key: call[key] for key in ("txt_ids", "img_ids")}
    context = tokens[:, n:].clone() if tokens.shape[1] > n else None
    return tokens[:, :n], Condition("longcat-image", tuple(tokens[:, :n].shape[1:]), rows, context, shared)


def _guide(v: Tensor, v_null: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Classifier-free guidance; without a source, each token's velocity is brought down to the norm it has in `v`."""
    guided = classifier_free(v, v_null, scale)
    if condition is not None and condition.context is not None:
        return guided
    return guided * (v.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)


def _grid(condition: Condition) -> tuple[int, int]:
    ids = condition.shared["img_ids"]
    rows, columns = (int(v) + 1 for v in (ids - ids[0])[: condition.shape[0], 1:3].amax(0))
    return rows, columns


LONGCAT_IMAGE = Family(
    name="longcat-image",
    generation="LongCatImagePipeline",
    editing="LongCatImageEditPipeline",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
    guidance_off={"guidance_scale": 1.0},
    guidance_on=lambda scale: {"guidance_scale": scale},
    guide=_guide,
    prompt_kwargs=("encoder_hidden_states",),
    text_components=("text_encoder",),
    call=(),
    prompt_lengths=_lengths,
    prompt_limit=lambda pipe, call: pipe.tokenizer_max_length,
    source_text=352,  # a quarter of a megapixel in patches of 28 pixels
    dummy_prompt=_dummy_prompt,
    prepare_recording=_prepare_recording,
    extra=_extra,
    size_of=_size_of,
    grid=_grid,
    split=_split,
    velocity=velocity,
    decode=decode,
    encode_images=encode_images,
)
