"""`make_pipeline`: the parts of the small model, each of the class that a full-size FLUX.2 klein has.

The tokenizer knows the 60 words of the synthetic scenes and drops those without meaning ("a photo of the"), so
that ten tokens hold every instruction. The text encoder is a frozen, seeded Qwen3 with orthonormal word vectors:
its residual stream carries words and their context without any training. The transformer is trained by ``flow.py``,
the autoencoder's decoder by ``decoder.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from danceopd.worlds.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, STYLES
from danceopd.worlds.scenes.prompts import NUMBERS, plural

LATENT_CHANNELS = 16
TEXT_TOKENS = 10
SHIFT = 3.0
"""Static timestep shift of the scheduler: more steps at high noise, where composition is decided."""
CALL = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "max_sequence_length": TEXT_TOKENS,
}
"""The settings of the shipped model's pipeline call; written to its ``danceopd.json``."""

SILENT = ("a", "an", "the", "of", "photo", "in", "on", "it", "this")
WORDS = (
    "left right above below top bottom corner leftmost rightmost shape and with to into add remove take away "
    "replace turn make change put redraw colour background style"
).split()


def vocabulary() -> list[str]:
    """Every word that the tokenizer knows, the two special ones first."""
    words = [*SHAPES, *(plural(s) for s in SHAPES), *COLOURS, *BACKGROUNDS, *STYLES, *NUMBERS.values(), *WORDS]
    return ["<pad>", "<unk>", *words]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the vocabulary of the synthetic scenes and a one-line chat template."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("color", "colour"),
            normalizers.Replace(Regex("[^a-z<>]+"), " "),
            normalizers.Replace(Regex(rf"\b({'|'.join(SILENT)})\b"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=TEXT_TOKENS,
        chat_template="{{ messages[0]['content'] }}",
    )


def make_text_encoder(seed: int = 0) -> Qwen3ForCausalLM:
    """A frozen Qwen3 of 27 layers (klein reads layers 9, 18 and 27), width 64, 0.5 M parameters."""
    words = len(vocabulary())
    width = 64
    torch.manual_seed(seed)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        orthonormal = torch.linalg.qr(torch.randn(width, width))[0]
        encoder.model.embed_tokens.weight.copy_(orthonormal[:words] * width**0.5)
    return encoder.eval().requires_grad_(False)


def make_transformer(seed: int = 0) -> Flux2Transformer2DModel:
    """A FLUX.2 transformer of width 128: two double-stream and four single-stream blocks, 2.1 M parameters."""
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * 64,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 8, 8, 8),
        rope_theta=100,
        guidance_embeds=False,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The stock Euler scheduler with a static shift."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)


def make_pipeline(vae: AutoencoderKLFlux2, transformer: Flux2Transformer2DModel, seed: int = 0) -> Flux2KleinPipeline:
    """The stock pipeline around the given autoencoder and transformer."""
    return Flux2KleinPipeline(
        scheduler=make_scheduler(),
        vae=vae.eval(),
        text_encoder=make_text_encoder(seed),
        tokenizer=make_tokenizer(),
        transformer=transformer.eval(),
    )


def save_pipeline(pipe: Flux2KleinPipeline, folder: Path) -> None:
    """Write the pipeline as safetensors, and its call settings as ``danceopd.json``."""
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "danceopd.json").write_text(json.dumps(CALL, indent=1) + "\n")
