"""`Adapter`: counts, hashes, products, rounding and copies. `LoraLinear` against PEFT's layer: exactness and memory."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import CALL, random_adapter, tiny_klein
from torch import nn

from danceopd.models.backbone import Backbone
from danceopd.models.lora import Adapter, LoraLinear
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

KLEIN = FAMILIES["flux2-klein"]


def test_adapter_counts_hashes_and_multiplies():
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    one = Adapter({"y": (a, b), "x": (a[:1], b[:, :1])})
    assert (one.rank, one.ranks, one.parameters, len(one)) == (2, {"x": 1, "y": 2}, 24, 2)
    assert torch.equal(one.delta("y"), b @ a)
    assert one.sha256 == Adapter({"x": (a[:1], b[:, :1]), "y": (a, b)}).sha256
    assert one.sha256 != Adapter({"y": (a, b), "z": (a[:1], b[:, :1])}).sha256
    assert one.sha256 != Adapter({"y": (a + 1e-6, b), "x": (a[:1], b[:, :1])}).sha256
    with pytest.raises(ValueError, match="y"):
        Adapter({"y": (a, b.T)})


def test_adapter_to_rounds_and_copies():
    one = Adapter({"y": (torch.randn(2, 5), torch.randn(3, 2))})
    low = one.to(dtype=torch.bfloat16)
    assert low.tensors["y"][0].dtype == torch.float32
    assert torch.equal(low.tensors["y"][0], one.tensors["y"][0].bfloat16().float())
    copy = one.to()
    copy.tensors["y"][0].zero_()
    assert one.tensors["y"][0].abs().min() > 0


# The layer


SHAPES = {"tokens": (2, 7, 24), "one vector": (3, 24), "a slice of more tokens": (2, 7, 24)}


def peft_layer(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float):
    """PEFT's own layer with these fp32 weights, and its parameters."""
    box = inject_adapter_in_model(LoraConfig(r=len(a), target_modules=["0"]), nn.Sequential(base))
    layer = box[0]
    for half, value in ((layer.lora_A, a), (layer.lora_B, b)):
        half["default"].weight = nn.Parameter(value.float().clone())
    layer.scaling["default"] = scale
    return layer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def our_layer(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float, name: str = "student"):
    layer = LoraLinear(base)
    layer.add(name, a, b, scale, trainable=True)
    layer.loras[name].cast(base.weight.dtype)
    layer.activate(name)
    return layer, [layer.loras[name].a, layer.loras[name].b]


def answers(layer, parameters, x):
    """What a layer gives for x, and its gradients to x and to the parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return [y, *torch.autograd.grad((y.float() * weight).sum(), [x, *parameters])]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "subclass", "forward replaced", "hook"])
def test_the_layer_is_pefts(kind, shape, bias):
    """Result and gradients, also where the base computes itself (another class of Linear, an offloading hook)."""
    torch.manual_seed(0)
    x = numbers(*SHAPES[shape], seed=1)
    if shape == "a slice of more tokens":
        x = numbers(2, 9, 24, seed=1)[:, 1:-1]
    a, b, base = numbers(4, 24, seed=2), numbers(10, 4, seed=3), nn.Linear(24, 10, bias=bias).requires_grad_(False)
    wanted = answers(*peft_layer(copy.deepcopy(base), a, b, 0.7), x)
    calls = []
    if kind == "subclass":
        base.__class__ = type("Quantised", (nn.Linear,), {})
    elif kind == "forward replaced":
        base.forward = lambda x: calls.append(1) or nn.Linear.forward(base, x)
    elif kind == "hook":
        base.register_forward_hook(lambda *_: calls.append(1))
    layer, parameters = our_layer(base, a, b, 0.7)
    for found, expected in zip(answers(layer, parameters, x), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    with torch.no_grad():
        assert (layer(x) - wanted[0]).norm() <= 1e-6 * wanted[0].norm()
        layer.activate(None)
        assert torch.equal(layer(x), nn.functional.linear(x, base.weight, base.bias))
    assert bool(calls) == (kind in ("forward replaced", "hook"))


def test_a_result_may_be_written_into_and_x_is_kept_once():
    """As models do with a Linear's result; what is kept besides weights is x itself and the rank's columns."""
    base = nn.Linear(24, 10).requires_grad_(False)
    layer, parameters = our_layer(base, numbers(4, 24, seed=2), numbers(10, 4, seed=3), 1.0)
    x, kept = numbers(2, 7, 24, seed=1).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    weights = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in weights) == x.numel() + 2 * 7 * 4
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    y.mul_(2)
    (y.sum() / 2).backward()
    plain = torch.autograd.grad(layer(x).sum(), parameters)
    torch.testing.assert_close([p.grad for p in parameters], list(plain))


def test_half_precision_errs_at_most_half_more_than_peft():
    """A whole tiny transformer in bf16 against float64: velocity and gradients, PEFT's layers in fp32 and ours."""
    pipe = tiny_klein()
    adapter = random_adapter(pipe.transformer, seed=1, size=0.1)
    condition = GenerationPipeline(pipe, KLEIN, CALL).conditions(["a red circle", "two blue square", "a ring"])
    x, sigma = numbers(3, *condition.shape, seed=4), torch.tensor([0.9, 0.5, 0.2])

    def found(dtype, peft):
        transformer = tiny_klein().transformer.to(dtype).requires_grad_(False)
        inputs = condition._map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        if peft:
            paths = list(adapter.tensors)
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=paths), transformer)
            parameters = []
            for path, pair in adapter.tensors.items():
                layer = transformer.get_submodule(path)
                for half, value in zip((layer.lora_A, layer.lora_B), pair):
                    kept = torch.float64 if dtype == torch.float64 else torch.float32
                    half["default"].weight = nn.Parameter(value.to(kept))
                    parameters.append(half["default"].weight)
            velocity = KLEIN.velocity(transformer, x, sigma, inputs)
        else:
            backbone = Backbone(transformer, KLEIN)
            backbone.add_adapter("student", adapter, trainable=True)
            layers = [backbone._layers[path].loras["student"] for path in adapter.tensors]
            parameters = [half for lora in layers for half in (lora.a, lora.b)]
            with backbone.acting_as("student"):
                velocity = backbone.velocity(x, sigma, inputs)
        gradients = torch.autograd.grad(velocity.square().sum(), parameters)
        return velocity.detach().double(), torch.cat([g.double().flatten() for g in gradients])

    exact = found(torch.float64, True)
    for dtype, allowed in ((torch.float32, None), (torch.bfloat16, 1.5)):
        for wanted, theirs, mine in zip(exact, found(dtype, True), found(dtype, False)):
            errors = [float((one - wanted).norm() / wanted.norm()) for one in (theirs, mine)]
            assert errors[1] <= (1.5e-6 if allowed is None else allowed * errors[0]), (dtype, errors)


def test_low_copies_follow_the_weights():
    """Inside one context too, in place, and they are no parameters of the transformer."""
    backbone = Backbone(tiny_klein().transformer.to(torch.bfloat16), KLEIN)
    parameters = backbone.new_student(rank=2)
    with backbone.acting_as("student"):
        lora = next(iter(backbone._layers.values())).loras["student"]
        where = [half.data_ptr() for half in lora.low]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        backbone._cast("student")
        assert all(torch.equal(low, full.bfloat16()) for low, full in zip(lora.low, (lora.a, lora.b)))
        assert [half.data_ptr() for half in lora.low] == where
    assert {id(p) for p in backbone.transformer.parameters() if p.requires_grad} == {id(p) for p in parameters}


@pytest.mark.parametrize("name", ["keys", "forward", "weight", "training", "lora-A_b"])
def test_any_name_that_a_recipe_takes_is_an_adapters(name):
    backbone = Backbone(tiny_klein().transformer, KLEIN)
    backbone.add_adapter(name, random_adapter(backbone.transformer))
    with backbone.acting_as(name):
        assert all(layer.active is layer.loras[name] for layer in backbone._layers.values())


def test_a_fifth_less_is_kept_than_by_pefts_layers():
    """klein-4B's widths, two blocks of it, on the meta device, counted as benchmarks/activations.py does."""
    script = Path(__file__).parents[2] / "benchmarks" / "activations.py"
    if not script.is_file():
        pytest.skip("benchmarks are not part of an installed package")
    counting = runpy.run_path(str(script))
    kept = []
    for add in (counting["pefts"], counting["ours"]):
        transformer = counting["klein"]((1, 1))
        add(transformer, 64)
        kept.append(counting["count"](transformer)["kept"])
    assert 0.6 * kept[0] < kept[1] < 0.8 * kept[0]
