"""Layers on quantised Linears against PEFT's on the same; a base in the computer's memory against one that is not."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tinies import TINYS
from tiny import random_adapter
from torch import nn

from danceopd.errors import UserError
from danceopd.models import storage
from danceopd.models.backbone import Backbone
from danceopd.models.lora import LoraLinear
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

KINDS = ("nf4", "int8", "fp8", "gguf")
WIDE, HIGH = 64, 96


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised_linear(kind: str, dtype: torch.dtype) -> nn.Linear:
    """A Linear of `WIDE` to `HIGH` with a bias, quantised."""
    linear = nn.Linear(WIDE, HIGH)
    linear.weight.data, linear.bias.data = numbers(HIGH, WIDE, seed=1), numbers(HIGH, seed=2)
    linear = linear.to(dtype).requires_grad_(False)
    if kind == "gguf":
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        packed = torch.from_numpy(gguf.quants.quantize(linear.weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0))
        layer = GGUFLinear(WIDE, HIGH, True, compute_dtype=dtype)
        layer.weight, layer.bias = GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType.Q8_0), linear.bias
        return layer.requires_grad_(False)
    box = nn.Module()
    box.linear, box.config = linear, SimpleNamespace()
    said = storage.quantise(box, kind, dtype, torch.device("cpu"))
    assert f"1 of 1 Linear layers quantised to {kind}" in said
    return box.linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_on_a_quantised_linear_is_pefts(kind: str, dtype: torch.dtype) -> None:
    a, b, x = numbers(4, WIDE, seed=3), numbers(HIGH, 4, seed=4), numbers(2, 7, WIDE, seed=5).to(dtype)

    def answers(layer, parameters):
        given = x.detach().requires_grad_()
        y = layer(given)
        weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        return [y, *torch.autograd.grad((y.float() * weight).sum(), [given, *parameters])]

    box = nn.Sequential(quantised_linear(kind, dtype))
    box.is_loaded_in_4bit = kind == "nf4"
    peft = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["0"]), box)[0]
    halves = []
    for half, value in ((peft.lora_A, a), (peft.lora_B, b)):
        half["default"].weight = nn.Parameter(value.clone())
        halves.append(half["default"].weight)
    wanted = answers(peft, halves)
    ours = LoraLinear(quantised_linear(kind, dtype))
    ours.add("student", a, b, 1.0, trainable=True)
    ours.loras["student"].cast(ours.compute_dtype)
    ours.activate("student")
    assert ours.quantised and ours.compute_dtype == dtype
    for found, expected in zip(answers(ours, [ours.loras["student"].a, ours.loras["student"].b]), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.float().norm()
    exact = nn.functional.linear(x, storage.dequantised(ours.base_layer, dtype), ours.bias)
    with torch.no_grad():
        ours.activate(None)
        assert (ours(x) - exact).float().norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * exact.float().norm()


def test_a_quantised_layer_keeps_its_input_once_and_no_weight_of_full_size() -> None:
    layer = LoraLinear(quantised_linear("gguf", torch.float32))
    layer.add("student", numbers(4, WIDE, seed=3), numbers(HIGH, 4, seed=4), 1.0, trainable=True)
    layer.activate("student")
    x, kept = numbers(2, 7, WIDE, seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in weights) == x.numel() + 2 * 7 * 4


def test_a_student_is_not_merged_into_quantised_weights() -> None:
    pipe = TINYS[0].build()
    backbone = Backbone(pipe.transformer, FAMILIES[TINYS[0].family])
    backbone.new_student("student", rank=2)
    storage.quantise(pipe.transformer, "int8", torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cannot be merged into quantised weights"), backbone.merged("student"):
        pass
    assert not backbone.merging_is_cheaper("student")


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_a_base_in_the_computers_memory_gives_the_same(tiny) -> None:
    """Velocities and gradients, bit for bit; after a forward every block has its own parameters again."""
    family, pipe = FAMILIES[tiny.family], tiny.build()
    condition = GenerationPipeline(pipe, family, tiny.call).conditions(["a red circle"])
    x, sigma = numbers(1, *condition.shape, seed=4), torch.tensor([0.5])

    def found(offloaded: bool):
        transformer = tiny.build().transformer
        backbone = Backbone(transformer, family)
        backbone.add_adapter("draws", random_adapter(transformer, targets=family.lora_targets, seed=1))
        backbone.checkpoint_gradients()
        if offloaded:
            assert "block by block" in storage.offload(backbone, torch.device("cpu"))
        backbone.new_student("student", 4, 1, random_adapter(transformer, targets=family.lora_targets, seed=2))
        before = dict(transformer.named_parameters())
        with backbone.acting_as("draws"), torch.no_grad():
            teacher = backbone.velocity(x, sigma, condition)
        with backbone.acting_as("student"):
            student = backbone.velocity(x, sigma, condition)
        (student - teacher).square().sum().backward()
        assert all(p is before[name] for name, p in transformer.named_parameters())
        return [teacher, student.detach(), *(p.grad for p in backbone.parameters("student") if p.grad is not None)]

    whole, shared = found(False), found(True)
    assert len(whole) == len(shared) > 4
    assert all(torch.equal(a, b) for a, b in zip(whole, shared, strict=True))


def test_while_a_block_runs_it_has_copies_of_its_weights() -> None:
    pipe = TINYS[0].build()
    backbone = Backbone(pipe.transformer, FAMILIES[TINYS[0].family])
    storage.offload(backbone, torch.device("cpu"))
    block, seen = pipe.transformer.transformer_blocks[0], []
    own = {p.data_ptr() for p in block.parameters()}
    stock = block.forward
    block.forward = lambda *a, **k: seen.extend(p.data_ptr() for p in block.parameters()) or stock(*a, **k)
    condition = GenerationPipeline(TINYS[0].build(), backbone.family, TINYS[0].call).conditions(["a red circle"])
    backbone.velocity(numbers(1, *condition.shape, seed=4), torch.tensor([0.5]), condition)
    assert seen and not own & set(seen) and {p.data_ptr() for p in block.parameters()} == own


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    with pytest.raises(UserError, match=r"int8 need torchao, which is not installed; pip install 'danceopd\[quant\]'"):
        storage.check_package("int8")
    storage.check_package("nf4")
