"""Tiny Z-Image pipelines of the real classes: a plain transformer, and one that also reads SigLIP2 features.

The VAE is in bfloat16: the stock omni pipeline hands source images to it in that dtype, whatever it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import Tiny, finish, qwen_tokenizer, scale_matrices, seeded
from transformers import Qwen3Config, Qwen3Model, Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 100}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def tiny_z_image(folder: str | Path | None = None, seed: int = 0, siglip: int | None = None) -> ZImagePipeline:
    """The pipeline; with `siglip`, a number of features, it is an omni pipeline that draws and edits."""
    with seeded(seed):
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "vae": _vae(),
            "text_encoder": _text_encoder(),
            "tokenizer": qwen_tokenizer(["<|vision_start|>", "<|vision_end|>", "<think>", "</think>"], TEMPLATE),
            "transformer": _transformer(siglip),
        }
        if siglip is None:
            pipe = ZImagePipeline(**parts)
        else:
            vision, processor = _siglip(siglip), Siglip2ImageProcessorPil(patch_size=16, max_num_patches=12)
            pipe = ZImageOmniPipeline(**parts, siglip=vision, siglip_processor=processor)
    return finish(pipe, folder)


def tiny_z_image_omni(folder: str | Path | None = None, seed: int = 0) -> ZImageOmniPipeline:
    return tiny_z_image(folder, seed, siglip=24)


def source_only(pipe: ZImagePipeline) -> ZImageOmniPipeline:
    """The stock omni pipeline on a transformer without SigLIP2 layers: one method says that no source has features."""
    omni = ZImageOmniPipeline(**pipe.components, siglip=None, siglip_processor=None)
    omni.prepare_siglip_embeds = lambda images, batch_size, device, dtype: [[] for _ in range(batch_size)]
    return finish(omni, None)


def _transformer(siglip: int | None) -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        siglip_feat_dim=siglip,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    scale_matrices(transformer, 1.5)
    with torch.no_grad():  # zeros when new: padding would be silent
        for name, token in transformer.named_parameters():
            if name.endswith("pad_token"):
                token.normal_()
    return transformer


def _text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return Qwen3Model(config)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(10)
    return vae.bfloat16()


def _siglip(features: int) -> Siglip2VisionModel:
    config = Siglip2VisionConfig(
        hidden_size=features,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=16,
    )
    vision = Siglip2VisionModel(config)
    scale_matrices(vision, 1.5)
    return vision


TINY = Tiny("z-image", tiny_z_image, source_only, CALL)
OMNI = Tiny(
    "z-image",
    tiny_z_image_omni,
    lambda pipe: pipe,
    CALL,
    source_only=(
        *(f"siglip_refiner.0.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"siglip_refiner.0.feed_forward.{name}" for name in ("w1", "w2", "w3")),
    ),
)
