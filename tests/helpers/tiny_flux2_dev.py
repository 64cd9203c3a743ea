"""A tiny FLUX.2-dev pipeline of the real classes, for 64x64 pictures (16 tokens)."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from tiny import _vae
from tiny_parts import ALPHABET, Tiny, finish, scale_matrices, seeded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

# As Mistral's, but for the system message, which says nothing about a picture and fills hundreds of bytes.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}"
    "{% endfor %}"
)


def tiny_flux2_dev(folder: str | Path | None = None, seed: int = 0) -> Flux2Pipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given."""
    with seeded(seed):
        pipe = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            transformer=Flux2Transformer2DModel(
                in_channels=32,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                timestep_guidance_channels=32,
                mlp_ratio=2.0,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=True,
            ),
        )
    pipe.vae.encoder.conv_out.weight.data.mul_(10)
    scale_matrices(pipe.transformer, 1.5)
    return finish(pipe, folder)


def _text_encoder() -> Mistral3ForConditionalGeneration:
    text = {
        "vocab_size": 270,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 30,  # the pipeline reads layers 10, 20 and 30
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 16,
    }
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", **vision}
    )
    return Mistral3ForConditionalGeneration(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer inside the Pixtral processor, which itself needs torchvision and here reads no picture."""
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *ALPHABET])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=specials[3:8],
        padding_side="left",
        chat_template=TEMPLATE,
    )


CALL = {"height": 64, "width": 64, "steps": 4, "max_sequence_length": 40}
TINY = Tiny("flux2-dev", tiny_flux2_dev, lambda pipe: pipe, CALL)
