"""HiDream-I1: mixtures of experts have a gradient; pictures have the size that the stock pipeline makes of a call."""

from __future__ import annotations

import pytest
import torch
from tiny_hidream import CALL, TINY, tiny_hidream
from tiny_parts import close, recorded_steps

from danceopd.pipelines import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

FAMILY = FAMILIES[TINY.family]


@pytest.fixture(scope="module")
def pipe():
    return tiny_hidream()


def test_the_gradient_goes_through_the_experts(pipe):
    """The stock inference path has none there; compared with a difference quotient."""
    ours = GenerationPipeline(pipe, FAMILY, CALL)
    condition, x, sigma = ours.conditions(["a red circle"]), ours.noise([1]), torch.tensor([0.6])
    for parameter in pipe.transformer.parameters():
        parameter.requires_grad_(False)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    leaf = x.clone().requires_grad_()
    (FAMILY.velocity(pipe.transformer, leaf, sigma, condition) * weight).sum().backward()
    along = leaf.grad / leaf.grad.norm()
    step = 1e-3 * along
    with torch.no_grad():
        up, down = (FAMILY.velocity(pipe.transformer, x + s, sigma, condition) for s in (step, -step))
    slope = float(((up - down) * weight).sum() / 2e-3)
    assert slope == pytest.approx(float(leaf.grad.norm()), rel=0.02)


@pytest.mark.parametrize(("experts", "size"), [(0, (64, 64)), (4, (32, 128)), (4, (256, 128))])
def test_dense_models_and_other_shapes(experts, size):
    pipe = tiny_hidream(experts=experts)
    call = {**CALL, "height": size[0], "width": size[1]}
    ours = GenerationPipeline(pipe, FAMILY, call)
    stock = {k: v for k, v in call.items() if k != "steps"} | {"guidance_scale": 1.0, "num_inference_steps": 2}
    pictures, steps = recorded_steps(pipe, **stock, prompt="a ring", generator=torch.Generator().manual_seed(3))
    assert pictures[0].size == (ours.width, ours.height)
    condition, sigmas = ours.conditions(["a ring"]), GenerationPipeline(pipe, FAMILY, {**call, "steps": 2}).sigmas()
    for (velocity, x, _), sigma in zip(steps, sigmas, strict=False):
        close(FAMILY.velocity(pipe.transformer, x, sigma[None], condition), velocity, 2e-5)
    assert ours.encode_images(pictures).shape == x.shape
