"""A tiny Qwen-Image-2.1 pipeline of the real classes, for 64x64 pictures (16 tokens) with an alpha channel.

`Processor` is the real processor less its video part, which needs torchvision. A saved pipeline names this module, and
diffusers loads a part from such a module only where it has been imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tiny_parts import Tiny, finish, qwen_tokenizer, scale_matrices, seeded
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

CALL = {"height": 64, "width": 64, "steps": 4, "output_resolution": 64}
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


class Processor(Qwen3VLProcessor):
    """Text and images to token ids, pixel patches and their grids; no videos."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        for name, token in zip(("vision_start", "vision_end", "image", "video"), VISION, strict=True):
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_qwen21(
    folder: str | Path | None = None, seed: int = 0, sample_sigmas: list[float] | None = None, **config: Any
) -> QwenImage21Pipeline:
    """The pipeline, in eval mode, fp32 on the CPU; `config` is the transformer's where it differs."""
    tokenizer = qwen_tokenizer(VISION)
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=256 * 256)
    with seeded(seed):
        pipe = QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=AutoencoderKLQwenImage21(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=8,
                dim_mult=[1, 1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, -0.4, 0.5, -0.1, 0.2, -0.3],
                latents_std=[1.5, 0.8, 1.2, 0.9, 1.1, 1.3, 0.7, 1.0],
            ),
            text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, tokenizer),
            processor=Processor(images, tokenizer, chat_template=TEMPLATE),
            transformer=QwenImage21Transformer2DModel(
                **{
                    "in_channels": 8, "out_channels": 8, "num_layers": 2, "attention_head_dim": 16,
                    "num_attention_heads": 2, "context_in_dim": 32, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6),
                    **config,
                }  # fmt: skip
            ),
            sample_sigmas=sample_sigmas,
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


def qwen3_vl(kind: type, tokenizer: Any, layers: int = 2) -> Any:
    """A tiny Qwen3-VL of class `kind`."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, VISION, strict=True)},
    )
    return kind(config)


TINY = Tiny("qwen-image-2.1", tiny_qwen21, lambda pipe: pipe, CALL)
