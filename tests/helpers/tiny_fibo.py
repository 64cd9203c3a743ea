"""Tiny Bria FIBO and FIBO-Edit pipelines of the real classes, for 64x64 pictures (16 tokens of 16 pixels a side)."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKLWan,
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_parts import Tiny, finish, qwen_tokenizer, scale_matrices, seeded
from transformers import SmolLM3Config, SmolLM3ForCausalLM

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 96}


def tiny_fibo(folder: str | Path | None = None, seed: int = 0, text_layers: int = 2) -> BriaFiboPipeline:
    """The generation pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given.

    The transformer has four blocks: with two text layers, whose encoder gives three states, the last is used twice.
    """
    with seeded(seed):
        pipe = BriaFiboPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLWan(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.1 * (-1) ** i for i in range(16)],
                latents_std=[0.8 + 0.05 * i for i in range(16)],
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
            ),
            text_encoder=SmolLM3ForCausalLM(
                SmolLM3Config(
                    vocab_size=128_001,  # the null prompt is the token 128,000
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=text_layers,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    initializer_range=0.3,
                    pad_token_id=0,
                )
            ),
            tokenizer=qwen_tokenizer(),
            transformer=BriaFiboTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                text_encoder_dim=16,
                axes_dims_rope=[4, 4, 8],
            ),
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


def editing(pipe: BriaFiboPipeline) -> BriaFiboEditPipeline:
    """The stock editing pipeline over the same parts."""
    return finish(BriaFiboEditPipeline(**pipe.components), None)


TINY = Tiny("bria-fibo", tiny_fibo, editing, CALL)
