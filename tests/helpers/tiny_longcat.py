"""Tiny LongCat-Image and LongCat-Image-Edit pipelines of the real classes; the text encoder is that of tiny_qwen.

The stock editing pipeline brings every source to a megapixel. Importing this module divides that area by 256, so that a
square source, and its edit, has 64x64 pixels (16 tokens).
"""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock
from tiny_flux1 import tiny_vae
from tiny_parts import Tiny, finish, scale_matrices, seeded
from tiny_qwen import DIVISOR, Processor, text_encoder, tokenizer
from transformers import Qwen2VLImageProcessorPil

CALL = {"height": 64, "width": 64, "steps": 4}
true_dimensions = stock.calculate_dimensions
stock.calculate_dimensions = lambda area, ratio: true_dimensions(area // DIVISOR, ratio)


def tiny_longcat(folder: str | Path | None = None, seed: int = 0) -> LongCatImagePipeline:
    """The generation pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=64 * 64)
    with seeded(seed):
        pipe = LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=tiny_vae(16),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            text_processor=Processor(images, tokenizer()),
            transformer=LongCatImageTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
            ),
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


def editing(pipe: LongCatImagePipeline) -> LongCatImageEditPipeline:
    """The stock editing pipeline over the same parts."""
    return finish(LongCatImageEditPipeline(**pipe.components), None)


TINY = Tiny("longcat-image", tiny_longcat, editing, CALL)
