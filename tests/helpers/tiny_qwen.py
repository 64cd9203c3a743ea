"""Tiny Qwen-Image pipelines of the real classes: Qwen-Image with Qwen-Image-Edit, and with Edit-Plus as in 2511.

The stock pipelines bring every source to a megapixel for the autoencoder. Importing this module divides the areas
they ask for by 256, so that a square source has 64x64 pixels (16 tokens). `Processor` is the real processor less
its video part, which needs torchvision. A saved editing pipeline names this module, and diffusers loads a part from
such a module only where it has been imported.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tiny_parts import Tiny, finish, qwen_tokenizer, seeded
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 160}
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# Whole words of the prompt templates, one token each: the stock pipelines drop the first 34 (64 in edits) tokens.
WORDS = (
    "system Describe detailing color shape texture quantity spatial relationships objects background assistant "
    "features input image explain instruction should alter modify Generate requirements maintaining consistency "
    "original where appropriate"
).split()
DIVISOR = 256


class Processor(Qwen2VLProcessor):
    """Text and images to token ids, pixel patches and their grids; no videos."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = VISION[-1]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


for stock in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
    real = stock.calculate_dimensions
    stock.calculate_dimensions = lambda area, ratio, real=real: real(area // DIVISOR, ratio)


def tiny_qwen(folder: str | Path | None = None, seed: int = 0, zero_cond_t: bool = False) -> QwenImagePipeline:
    with seeded(seed):
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, -0.4],
                latents_std=[1.5, 0.8, 1.2, 0.9],
            ),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=zero_cond_t,
            ),
        )
    return finish(pipe, folder)


def editing(pipe: QwenImagePipeline, kind: type = QwenImageEditPipeline) -> Any:
    """The stock editing pipeline over the same modules, with a processor of its own."""
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=64 * 64)
    return finish(kind(**pipe.components, processor=Processor(images, pipe.tokenizer)), None)


def save_editing(folder: Path, kind: type = QwenImageEditPipeline) -> None:
    editing(tiny_qwen(), kind).save_pretrained(folder)


def tokenizer() -> Any:
    return qwen_tokenizer([*VISION, *WORDS])


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id"), VISION, strict=True))
    words = tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        **{key: words.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


# The last block's text stream leads nowhere.
SILENT = tuple(
    f"transformer_blocks.1.{name}"
    for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
)
TINY = Tiny("qwen-image", tiny_qwen, editing, CALL, components=save_editing, silent=SILENT)
PLUS = Tiny(
    "qwen-image",
    partial(tiny_qwen, zero_cond_t=True),
    partial(editing, kind=QwenImageEditPlusPipeline),
    CALL,
    components=partial(save_editing, kind=QwenImageEditPlusPipeline),
    silent=SILENT,
)
