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
    """The stock inference path has none there; values are its values, gradients those of the sum written out."""
    ours = GenerationPipeline(pipe, FAMILY, CALL)
    mixture = pipe.transformer.single_stream_blocks[0].block.ff_i
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stock = mixture(hidden)
        FAMILY.velocity(pipe.transformer, ours.noise([1]), torch.ones(1), ours.conditions(["a red circle"]))
        close(mixture(hidden), stock)
    gradients = []
    for forward in (mixture, lambda h: written_out(mixture, h)):
        leaf = hidden.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    close(*gradients, 1e-5 * float(gradients[1].abs().max()))


def written_out(mixture, hidden):
    """The two best experts of each token, weighed, and the shared one."""
    weights, chosen = torch.nn.functional.linear(hidden, mixture.gate.weight).softmax(-1).topk(2, dim=-1)
    every = torch.stack([expert(hidden) for expert in mixture.experts], dim=-2)
    routed = every.take_along_dim(chosen[..., None], dim=-2) * weights[..., None]
    return routed.sum(-2) + mixture.shared_experts(hidden)


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
