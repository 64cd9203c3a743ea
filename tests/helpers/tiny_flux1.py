"""Tiny FLUX.1-dev and FLUX.1-Kontext-dev pipelines of the real classes, for 64x64 pictures (16 tokens)."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tiny_parts import Tiny, clip_tokenizer, finish, scale_matrices, seeded, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


def tiny_flux1(folder: str | Path | None = None, seed: int = 0) -> FluxPipeline:
    """The FLUX.1-dev pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    with seeded(seed):
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=tiny_t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            ),
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


def tiny_kontext(pipe: FluxPipeline) -> FluxKontextPipeline:
    """FLUX.1-Kontext-dev over the same parts."""
    editing = FluxKontextPipeline(**pipe.components)
    editing.set_progress_bar_config(disable=True)
    return editing


CLIP = {
    "vocab_size": 514,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 1,
    "hidden_size": 32,
    "projection_dim": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "hidden_act": "gelu",
}


def tiny_t5(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=98, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.encoder.conv_out.weight.data.mul_(10)
    return vae


CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 40}
TINY = Tiny("flux1", tiny_flux1, tiny_kontext, CALL)
