"""Helpers for tests of LoRA files: fixtures, keys, and a transformer's output with a LoRA by hand and by diffusers."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_adapter, tiny_klein

from danceopd.adapters.read import read_adapter
from danceopd.errors import UserError
from danceopd.models.lora import Adapter


def saved_base(tmp_path_factory) -> Path:
    """A fixture: the folder of a tiny klein pipeline."""
    folder = tmp_path_factory.mktemp("base")
    tiny_klein(folder)
    return folder


def klein_transformer():
    """A fixture: the transformer of that pipeline."""
    return tiny_klein().transformer


def klein_adapter(transformer) -> Adapter:
    """A fixture: a random adapter for that transformer."""
    return random_adapter(transformer, rank=4, seed=1)


def probe(transformer) -> torch.Tensor:
    """The transformer's output on fixed random inputs: 2 rows, 16 image tokens, 5 text tokens."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 32, generator=draw),
            encoder_hidden_states=torch.randn(2, 5, 48, generator=draw),
            timestep=torch.tensor([0.3, 0.9]),
            img_ids=torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).expand(2, -1, -1),
            txt_ids=torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 5))).expand(2, -1, -1),
            return_dict=False,
        )[0]


def merged(transformer, adapter: Adapter) -> torch.Tensor:
    """The oracle by hand: the same probe with W + BA written into a copy's weights."""
    copy = deepcopy(transformer)
    with torch.no_grad():
        for name in adapter.tensors:
            copy.get_submodule(name).weight += adapter.delta(name)
    return probe(copy)


def stock(base: Path, file: Path) -> torch.Tensor:
    """The probe through stock diffusers: from_pretrained, load_lora_weights."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(file)
    return probe(pipe.transformer)


def refused(path, *says: str, transformer=None, family=None) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(path, transformer, family)
    sentence = str(caught.value)
    for part in (Path(path).name, *says):
        assert re.search(part, sentence), f"{part!r} is not in {sentence!r}"
    assert "\n" not in sentence and len(sentence) < 600 and "; " in sentence
    return sentence


def flat(adapter: Adapter, form: str = "transformer.{}", halves=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    return {
        f"{form.format(name)}.{half}.weight": tensor.clone()
        for name, pair in adapter.tensors.items()
        for half, tensor in zip(halves, pair)
    }


def original_names(transformer) -> dict[str, torch.Tensor]:
    """{original FLUX.2 layer: (A, B)} for a double and a single block, as ai-toolkit and kohya name them."""
    draw = torch.Generator().manual_seed(3)
    block, single = transformer.transformer_blocks[1], transformer.single_transformer_blocks[0]
    width = block.attn.to_q.in_features
    sizes = {
        "double_blocks.1.img_attn.qkv": (width, 3 * width),
        "double_blocks.1.txt_attn.qkv": (width, 3 * width),
        "double_blocks.1.img_attn.proj": (width, width),
        "double_blocks.1.txt_attn.proj": (width, width),
        "double_blocks.1.img_mlp.0": (block.ff.linear_in.in_features, block.ff.linear_in.out_features),
        "double_blocks.1.txt_mlp.2": (
            block.ff_context.linear_out.in_features,
            block.ff_context.linear_out.out_features,
        ),
        "single_blocks.0.linear1": (
            single.attn.to_qkv_mlp_proj.in_features,
            single.attn.to_qkv_mlp_proj.out_features,
        ),
        "single_blocks.0.linear2": (single.attn.to_out.in_features, single.attn.to_out.out_features),
    }
    return {
        name: (0.3 * torch.randn(4, i, generator=draw), 0.3 * torch.randn(o, 4, generator=draw))
        for name, (i, o) in sizes.items()
    }


def changed(adapter, tmp_path, change) -> Path:
    """A foreign file (no metadata of ours) with `change` made to its tensors."""
    tensors = flat(adapter)
    change(tensors)
    save_file(tensors, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"
