"""A tiny Krea 2 pipeline of the real classes, for 64x64 pictures (16 tokens)."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from tiny_parts import Tiny, finish, qwen_tokenizer, scale_matrices, seeded
from tiny_qwen import WORDS
from tiny_qwen21 import VISION, qwen3_vl
from transformers import Qwen3VLModel

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 160}


def tiny_krea2(folder: str | Path | None = None, seed: int = 0, is_distilled: bool = False) -> Krea2Pipeline:
    """The pipeline, in eval mode, fp32 on the CPU; `is_distilled` as in Turbo."""
    tokenizer = qwen_tokenizer([*VISION, *WORDS])
    with seeded(seed):
        pipe = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, -0.4],
                latents_std=[1.5, 0.8, 1.2, 0.9],
            ),
            text_encoder=qwen3_vl(Qwen3VLModel, tokenizer, layers=3),
            tokenizer=tokenizer,
            transformer=Krea2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=48,
                timestep_embed_dim=16,
                text_hidden_dim=32,
                num_text_layers=3,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=48,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 6, 6),
            ),
            text_encoder_select_layers=(0, 2, 3),
            is_distilled=is_distilled,
        )  # fmt: skip
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


TINY = Tiny("krea2", tiny_krea2, None, CALL)
