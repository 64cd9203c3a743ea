"""Quantised and offloaded bases on a GPU: whole merges, the memory that a block takes, and bases saved in 4 bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig
from safetensors.torch import load_file
from tinies import KLEIN
from tiny_merge import WEIGHTS, family_recipe
from torch import nn

from danceopd.merge import merge
from danceopd.models import storage
from danceopd.models.backbone import Backbone
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
FEW = {"steps": 2, "validation": {"every": 0}, "monitor": {"every": 0}, "device": "cuda", "dtype": "bf16"}


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein")
    return folder, family_recipe(KLEIN, KLEIN.build(), folder).resolved() | FEW


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_merge_on_a_quantised_base(klein, tmp_path, kind, kernels):
    _, given = klein
    own = {**given, "base_dtype": kind, "kernels": kernels, "gradient_checkpointing": True}
    merge(Recipe(**{**own, "output": str(tmp_path / "run")}), lambda *_: None)
    assert load_file(tmp_path / "run" / WEIGHTS)


def test_a_base_that_was_saved_in_4_bits(klein, tmp_path):
    folder, given = klein
    shutil.copytree(folder / "base", tmp_path / "base")
    place = tmp_path / "base" / "transformer"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")  # it says fp32; the merge computes in bf16
    saved = type(KLEIN.build().transformer).from_pretrained(
        place, quantization_config=how, torch_dtype=torch.bfloat16
    )
    shutil.rmtree(place)
    saved.save_pretrained(place)
    own = {**given, "base": str(tmp_path / "base"), "output": str(tmp_path / "run")}
    merge(Recipe(**own), lambda *_: None)
    assert load_file(tmp_path / "run" / WEIGHTS)


def test_an_offloaded_base_gives_the_same_student(klein, tmp_path):
    _, given = klein
    same = {**given, "gradient_checkpointing": True, "rollout": {"steps": 2, "merged": False}, "kernels": False}
    for name, how in (("whole", {}), ("shared", {"offload": "blocks"})):
        merge(Recipe(**{**same, **how, "output": str(tmp_path / name)}), lambda *_: None)
    whole, shared = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "shared"))
    for key, tensor in whole.items():
        torch.testing.assert_close(shared[key], tensor, atol=1e-5, rtol=0)


def test_two_blocks_at_most_are_on_the_card():
    """Eight blocks of 64 MB; forward and backward with gradient checkpointing."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(8))

        def forward(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return x

    model = Blocks().requires_grad_(False)
    backbone = Backbone(model, FAMILIES["flux2-klein"])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    storage.offload(backbone, torch.device("cuda", torch.cuda.current_device()))
    x = torch.randn(4, 4096, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    model(x).sum().backward()
    assert x.grad is not None
    assert torch.cuda.max_memory_allocated() - before < 3 * 64 * 2**20
    assert all(p.device.type == "cpu" and p.is_pinned() for p in model.parameters())
