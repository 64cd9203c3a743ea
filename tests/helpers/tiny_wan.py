"""A tiny Wan pipeline of the real classes, for 64x64 pictures (16 tokens a frame of latents)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_parts import Tiny, finish, scale_matrices, seeded, t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 40}


def tiny_wan(
    folder: str | Path | None = None, seed: int = 0, unipc: bool = False, two: bool = False, **settings: Any
) -> WanPipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given.

    `unipc`: with the scheduler of the released models. `two`: as Wan 2.2 A14B, with a second transformer for what is
    less noisy than 0.7. `settings` are the pipeline's (`expand_timesteps`).
    """
    if two:
        with seeded(seed + 1):
            settings |= {"transformer_2": tiny_transformer(), "boundary_ratio": 0.7}
    kind, how = (FlowMatchEulerDiscreteScheduler, {"shift": 3.0})
    if unipc:
        how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        kind = UniPCMultistepScheduler
    with seeded(seed):
        pipe = WanPipeline(
            scheduler=kind(**how),
            vae=AutoencoderKLWan(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1 * (-1) ** i for i in range(4)],
                latents_std=[0.8 + 0.05 * i for i in range(4)],
            ),
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
            ),
            tokenizer=t5_tokenizer(),
            transformer=tiny_transformer(),
            **settings,
        )
    for transformer in (pipe.transformer, *([pipe.transformer_2] if two else [])):
        scale_matrices(transformer, 1.5)
    return finish(pipe, folder)


def tiny_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


TINY = Tiny("wan", tiny_wan, None, CALL)
