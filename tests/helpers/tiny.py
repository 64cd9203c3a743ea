"""A tiny, randomly initialised FLUX.2 klein pipeline of the real classes, for 64x64 pictures (16 tokens).

Words outside its vocabulary read as one unknown token; every weight comes from a seed and the global random
state is left alone. With random weights every prompt and every source image gives another output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from danceopd.models.lora import Adapter
from danceopd.pipelines.registry import FAMILIES

CALL = {"height": 64, "width": 64, "steps": 6, "max_sequence_length": 24}
WORDS = (
    "a an the and on in of to with no two three four left right above below red green blue yellow purple white "
    "black circle square triangle star ring cross background make add remove replace change it"
).split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


TRANSFORMER = {
    "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "timestep_guidance_channels": 32, "mlp_ratio": 2.0, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
}  # fmt: skip


def tiny_klein(
    folder: str | Path | None = None, seed: int = 0, width: int = 16, vae: Any = None, **config: Any
) -> Flux2KleinPipeline:
    """The pipeline, in eval mode, fp32 on the CPU; also saved to `folder` when one is given.

    `config` is the transformer's where it differs, `width` the text encoder's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, num_train_timesteps=1000),
            vae=vae or _vae(),
            text_encoder=_text_encoder(width),
            tokenizer=_tokenizer(),
            transformer=Flux2Transformer2DModel(**{**TRANSFORMER, "joint_attention_dim": 3 * width, **config}).eval(),
        )
    with torch.no_grad():  # with default initialisations some inputs hardly change the output
        pipe.vae.encoder.conv_out.weight.mul_(10)
        for weight in pipe.transformer.parameters():
            weight.mul_(1.5 if weight.ndim == 2 else 1)
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    ).eval()
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _text_encoder(width: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(WORDS) + 6,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="right",
        chat_template=TEMPLATE,
    )


def random_adapter(
    transformer: torch.nn.Module, rank: int = 4, seed: int = 0, size: float = 0.3, targets: str | None = None
) -> Adapter:
    """An adapter with random A and B of entries about `size` on every module that `targets` full-matches."""
    targets = targets or FAMILIES["flux2-klein"].lora_targets
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, module in transformer.named_modules():
        path = path.removesuffix(".base_layer")
        if isinstance(module, torch.nn.Linear) and re.fullmatch(targets, path):
            out_features, in_features = module.weight.shape
            a = size * torch.randn(rank, in_features, generator=generator)
            tensors[path] = (a, size * torch.randn(out_features, rank, generator=generator))
    return Adapter(tensors)


def random_image(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Coloured noise in 8x8 blocks, RGB."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
