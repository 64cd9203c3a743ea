"""A tiny Anima, a modular pipeline of the real blocks and classes, for 64x64 pictures (16 tokens)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_parts import Tiny, qwen_tokenizer, scale_matrices, seeded, t5_tokenizer
from transformers import Qwen3Config, Qwen3Model

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 64}


def tiny_anima(folder: str | Path | None = None, seed: int = 0) -> AnimaModularPipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    words = qwen_tokenizer()
    with seeded(seed):
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "tokenizer": words,
            "t5_tokenizer": t5_tokenizer(),
            "text_encoder": Qwen3Model(
                Qwen3Config(
                    vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3, pad_token_id=0,
                )
            ),
            "text_conditioner": AnimaTextConditioner(
                source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2, target_vocab_size=98,
                min_sequence_length=64,
            ),
            "transformer": CosmosTransformer3DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False,
                extra_pos_embed_type=None,
            ),
            "vae": AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, -0.4],
                latents_std=[1.5, 0.8, 1.2, 0.9],
            ),
        }  # fmt: skip
    scale_matrices(parts["transformer"], 1.5)
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(**{k: m.eval() if isinstance(m, torch.nn.Module) else m for k, m in parts.items()})
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return pipe


TINY = Tiny("anima", tiny_anima, None, CALL)
