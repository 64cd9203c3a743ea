"""Compiled blocks compute what eager ones do, under every adapter, with a gradient and without."""

import pytest
import torch
from tiny import CALL, random_adapter, tiny_klein
from torch import nn

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.compile import compile_blocks, repeated_blocks
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

KLEIN = FAMILIES["flux2-klein"]


def test_compiled_blocks_compute_what_eager_ones_do():
    """Dynamo's tracing and guards, which is what adapters could break; code generation is torch's own."""
    pipe = tiny_klein()
    assert len(repeated_blocks(pipe.transformer)) == 4
    del pipe.transformer.transformer_blocks[1:], pipe.transformer.single_transformer_blocks[1:]  # one of each kind
    condition = GenerationPipeline(pipe, KLEIN, CALL).conditions(["a red circle", "a blue square"])
    backbone = Backbone(pipe.transformer, KLEIN)
    backbone.add_adapter("teacher", random_adapter(pipe.transformer, seed=1, size=0.1))
    student = backbone.new_student("student", 8, 0, random_adapter(pipe.transformer, seed=2, size=0.1))
    x = torch.randn(2, *condition.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.4])

    def outputs():
        found = []
        with torch.no_grad():
            for name in (None, "teacher", "student", None):
                with backbone.acting_as(name):
                    found.append(backbone.velocity(x, sigma, condition))
            with backbone.merged("student"):
                found.append(backbone.velocity(x, sigma, condition))
        with backbone.acting_as("student"):
            velocity = backbone.velocity(x, sigma, condition)
        gradients = torch.autograd.grad(velocity.square().sum(), student)
        return [*found, velocity.detach(), *gradients]

    eager = outputs()
    assert len(repeated_blocks(pipe.transformer)) == 2
    compile_blocks(pipe.transformer, "eager")
    for wanted, found in zip(eager, outputs()):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (eager[0] - eager[1]).abs().max() > 1e-2 and (eager[1] - eager[2]).abs().max() > 1e-2


def test_a_transformer_without_named_blocks_is_refused():
    with pytest.raises(UserError, match="Linear names no repeated blocks"):
        repeated_blocks(nn.Linear(2, 2))
