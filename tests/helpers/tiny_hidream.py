"""A tiny HiDream-I1 pipeline of the real classes.

The stock pipeline brings every size to 128 latents squared. Importing this module makes that 8, so that a picture has
64x64 pixels (16 tokens).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from tiny_flux1 import CLIP, tiny_t5, tiny_vae
from tiny_parts import Tiny, clip_tokenizer, finish, qwen_tokenizer, scale_matrices, seeded, t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 40}
true_init = HiDreamImagePipeline.__init__


@functools.wraps(true_init)
def _with_small_pictures(self: Any, *parts: Any, **named: Any) -> None:
    true_init(self, *parts, **named)
    self.default_sample_size = 8


HiDreamImagePipeline.__init__ = _with_small_pictures


def tiny_hidream(folder: str | Path | None = None, seed: int = 0, experts: int = 4) -> HiDreamImagePipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    llama = qwen_tokenizer()
    llama.eos_token = "<|im_end|>"
    with seeded(seed):
        pipe = HiDreamImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=tiny_t5(),
            tokenizer_3=t5_tokenizer(),
            text_encoder_4=LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(llama),
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    initializer_range=0.3,
                    attn_implementation="eager",
                )
            ),
            tokenizer_4=llama,
            transformer=HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_channels=[32, 16],
                text_emb_dim=64,
                num_routed_experts=experts,
                num_activated_experts=2,
                axes_dims_rope=(4, 2, 2),
                max_resolution=(32, 32),
                llama_layers=(0, 2, 2),
            ),
        )
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


TINY = Tiny("hidream", tiny_hidream, None, CALL)
