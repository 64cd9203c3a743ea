"""Fused modules inside stock transformers of every family: the same velocities and gradients, and no trace after."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CALL, random_adapter, random_image, tiny_klein
from tiny_transformers import FAMILIES, build, forward

from danceopd.kernels import install, installed, uninstall, using
from danceopd.kernels.masks import all_true
from danceopd.models.backbone import Backbone
from danceopd.models.fields import BaseField
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of

MODULES = {"flux2": 7, "flux1": 4, "sd3": 5, "sd3-plain": 5, "qwen": 4, "qwen-full": 4, "z-image": 9}


def state(model):
    """What an installation could leave behind: attributes of every module, and its processor."""
    return {name: (dict(vars(m)), getattr(m, "processor", None)) for name, m in model.named_modules()}


def gradients(model, call):
    out = forward(model, call)
    return out, torch.autograd.grad(out.float().square().sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("backend", ["torch", "op"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name, backend):
    model, call = build(name)
    before = state(model)
    stock, stock_grads = gradients(model, call)
    with installed(model):
        assert state(model) != before
        with using(backend):
            fused, grads = gradients(model, call)
            with torch.no_grad():
                rollout = forward(model, call)
        assert install(model) == 0
    assert torch.equal(fused, stock) and torch.equal(rollout, stock)
    size = max(g.abs().max() for g in stock_grads if g is not None)
    for a, b in zip(grads, stock_grads):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-6 * size
    assert state(model).keys() == before.keys()
    for key, (attributes, processor) in state(model).items():
        assert attributes.keys() == before[key][0].keys() and processor is before[key][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_of_a_family_is_covered(name):
    model, _ = build(name)
    assert install(model) == MODULES[name] and uninstall(model) == MODULES[name] and uninstall(model) == 0


@pytest.mark.parametrize("name", ["flux2", "flux1"])
def test_half_precision_bit_for_bit(name):
    model, call = build(name)
    model = model.bfloat16()
    call = {k: v.bfloat16() if k.endswith(("states", "projections")) else v for k, v in call.items()}
    with torch.no_grad():
        stock = forward(model, call)
        with installed(model), using("op"):
            assert torch.equal(forward(model, call), stock)


def test_fused_projections():
    """Packed q, k, v of both streams, as `fuse_projections` makes them: their gradient comes back packed."""
    model, call = build("flux1")
    model.transformer_blocks[0].attn.fuse_projections()
    stock, stock_grads = gradients(model, call)
    with installed(model), using("op"):
        fused, grads = gradients(model, call)
    assert torch.equal(fused, stock)
    for a, b in zip(grads, stock_grads):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4))


def test_what_is_not_covered_is_left_alone():
    model, _ = build("flux1")
    block = model.transformer_blocks[0]
    block.attn.norm_q = torch.nn.LayerNorm(64)
    block.forward = type(block).forward.__get__(block)  # as a hook of accelerate does
    processor = block.attn.processor
    assert install(model) == MODULES["flux1"] - 2
    assert block.attn.processor is processor
    uninstall(model)
    assert "forward" in vars(block)


def test_the_attention_backend_reaches_the_stock_processor():
    model, _ = build("flux2")
    attn = model.transformer_blocks[0].attn
    stock = attn.processor
    with installed(model):
        attn.set_attention_backend("native")
        assert attn.processor._attention_backend == stock._attention_backend != None  # noqa: E711
    assert attn.processor is stock


def test_a_copy_of_a_fused_model_is_its_own():
    model, call = build("flux2")
    install(model)
    copied = copy.deepcopy(model)
    uninstall(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
        assert forward(model, call).abs().max() > 0 and forward(copied, call).abs().max() == 0


def test_full_masks_are_dropped_and_others_kept():
    full, holed = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    holed[1, 3:] = False
    assert all_true(full) and not all_true(holed)
    full[0, 0] = False  # in place: read again
    assert not all_true(full)


def test_gradient_checkpointing():
    model, call = build("flux2")
    _, stock = gradients(model, call)
    model.enable_gradient_checkpointing()
    model.train()
    with installed(model), using("op"):
        _, fused = gradients(model, call)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(fused, stock) if b is not None)


def test_the_stock_pipeline_and_the_student():
    """Velocities of klein's drawing and editing conditions, and the gradient of a LoRA, with everything installed."""
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("student", random_adapter(pipe.transformer), trainable=True)
    draw = GenerationPipeline(pipe, family_of(pipe), CALL)
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    conditions = [
        draw.conditions(["a red circle", "two blue square"]),
        edit.conditions(["make it red", "remove the star"], [random_image(0), random_image(1)]),
    ]
    x, sigma = draw.noise([1, 2]), torch.tensor([0.8, 0.3])

    def outputs():
        field = BaseField(backbone)
        base = [field(x, sigma, condition) for condition in conditions]
        with backbone.acting_as("student"):
            velocity = backbone.velocity(x, sigma, conditions[1])
            return [*base, *torch.autograd.grad(velocity.square().sum(), backbone.parameters("student"))]

    stock = outputs()
    with installed(pipe.transformer):
        for backend in ("torch", "op"):
            with using(backend):
                fused = outputs()
            assert all(torch.equal(a, b) for a, b in zip(fused[:2], stock[:2]))
            assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-7 for a, b in zip(fused[2:], stock[2:]))
