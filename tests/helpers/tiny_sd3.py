"""A tiny Stable Diffusion 3.5 pipeline of the real classes, for 64x64 pictures (8x8 latents, 16 tokens)."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_flux1 import CLIP, tiny_t5, tiny_vae
from tiny_parts import Tiny, clip_tokenizer, finish, scale_matrices, seeded, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


def tiny_sd3(folder: str | Path | None = None, seed: int = 0) -> StableDiffusion3Pipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    with seeded(seed):
        pipe = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=tiny_t5(width=64),
            tokenizer_3=t5_tokenizer(),
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_projection_dim=32,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            ),
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


# The last block's text queries lead nowhere: what they would attend for is dropped.
SILENT = ("transformer_blocks.1.attn.add_q_proj",)
CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 40}
TINY = Tiny("sd3", tiny_sd3, None, CALL, silent=SILENT)
