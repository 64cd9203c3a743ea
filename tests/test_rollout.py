"""Ragged rollouts: each row where it should be, no wasted row, no graph, order kept."""

from __future__ import annotations

import pytest
import torch
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.backbone import Backbone
from danceopd.fields import AdapterField, MergedField
from danceopd.pipelines import EditingPipeline, family_of
from danceopd.rollout import rollout


@pytest.fixture(scope="module")
def world():
    pipe = tiny_klein()
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    prompts = ["make it red", "remove the star", "add a ring", "change it", "add a cross"]
    condition = edit.conditions(prompts, [random_image(i) for i in range(5)])
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("edit", random_adapter(pipe.transformer, seed=1))
    return backbone, edit, condition, edit.noise([1, 2, 3, 4, 5])


class Counting:
    """A field that counts rows and checks that it gets equally many of everything."""

    def __init__(self, field):
        self.field, self.rows = field, 0

    def __call__(self, x, sigma, condition):
        assert len(x) == len(sigma) == len(condition) > 0
        self.rows += len(x)
        return self.field(x, sigma, condition)


@pytest.mark.parametrize("stop", [[3, 0, 6, 1, 3], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [6, 6, 0, 0, 6]])
def test_each_row_is_at_its_own_stop_and_no_row_is_wasted(world, stop):
    backbone, edit, condition, noise = world
    field, sigmas = Counting(AdapterField(backbone, "edit")), edit.sigmas()
    states = rollout(field, noise, sigmas, torch.tensor(stop), condition)
    assert field.rows == sum(stop)
    for i, depth in enumerate(stop):
        alone = edit.denoise(condition.rows([i]), noise[i : i + 1], field.field, sigmas)
        expected = next(s.x for s in alone if s.step == depth)
        assert (states[i] - expected[0]).abs().max() < 2e-5
    assert len({tuple(s.x.flatten()[:3].tolist()) for s in alone}) > 0 or depth == 6


def test_states_have_no_graph_but_may_enter_one(world):
    backbone, edit, condition, noise = world
    start = noise.clone()
    with backbone.merged("edit"):
        states = rollout(backbone.velocity, noise, edit.sigmas(), torch.tensor([1, 2, 3, 4, 5]), condition)
    assert torch.equal(noise, start) and states.dtype == torch.float32
    assert not states.requires_grad and not states.is_inference()
    parameters = backbone.new_student(rank=2)
    with backbone.acting_as("student"):
        loss = backbone.velocity(states, torch.full((5,), 0.5), condition).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in parameters) and parameters[1].grad.abs().max() > 0


def test_merged_rollout_equals_the_adapters(world):
    backbone, edit, condition, noise = world
    stop = torch.tensor([5, 1, 4, 2, 3])
    both = [rollout(f(backbone, "edit"), noise, edit.sigmas(), stop, condition) for f in (AdapterField, MergedField)]
    assert (both[0] - both[1]).abs().max() < 1e-4 and (both[0] - noise).abs().max() > 0.1


def test_callback_names_the_rows_still_walking(world):
    backbone, edit, condition, noise = world
    stop, seen = torch.tensor([2, 0, 3, 1, 2]), {}

    def look(step, rows, x):
        assert len(rows) == len(x)
        if step == 0:
            assert torch.equal(x, noise[rows])
        seen[step] = sorted(rows.tolist())

    rollout(AdapterField(backbone, None), noise, edit.sigmas(), stop, condition, look)
    assert seen == {0: [0, 2, 3, 4], 1: [0, 2, 4], 2: [2]}
    seen.clear()
    rollout(AdapterField(backbone, None), noise, edit.sigmas(), torch.full((5,), 1), condition, look)
    assert seen == {0: [0, 1, 2, 3, 4]}


def test_an_analytic_flow_lands_on_its_data():
    """v = (x − x0) / σ moves along a line: Euler is exact at every depth, whatever the grid."""
    x0, noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.randn(4, 3)
    sigmas, stop = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]), torch.tensor([4, 1, 3, 2])

    class Rows:
        def __init__(self, index):
            self.index = index

        def __len__(self):
            return len(self.index)

        def rows(self, index):
            return Rows(self.index[index])

    def field(x, sigma, condition):
        return (x - x0[condition.index]) / sigma[:, None]

    states = rollout(field, noise, sigmas, stop, Rows(torch.arange(4)))
    level = sigmas[stop][:, None]
    assert torch.allclose(states, (1 - level) * x0 + level * noise, atol=1e-6)


@pytest.mark.parametrize("stop", [[7, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [1, 1]])
def test_stops_off_the_grid_are_refused(world, stop):
    backbone, edit, condition, noise = world
    with pytest.raises(ValueError, match="stop"):
        rollout(AdapterField(backbone, None), noise, edit.sigmas(), torch.tensor(stop), condition)
