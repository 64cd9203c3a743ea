"""Ragged rollouts: each row where it should be, no wasted row, no graph, order kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flows import Gaussian, Rows, shifted
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.engine.rollout import rollout
from danceopd.engine.solvers import SOLVERS, AdamsBashforth, Euler
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, MergedField
from danceopd.pipelines import EditingPipeline, family_of


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


def test_callback_names_the_rows_that_go_on(world):
    backbone, edit, condition, noise = world
    stop, seen = torch.tensor([2, 0, 3, 1, 2]), {}

    def callback(step, rows, x):
        assert len(rows) == len(x)
        if step == 0:
            assert torch.equal(x, noise[rows])
        seen[step] = sorted(rows.tolist())

    rollout(AdapterField(backbone, None), noise, edit.sigmas(), stop, condition, callback)
    assert seen == {0: [0, 2, 3, 4], 1: [0, 2, 4], 2: [2]}
    seen.clear()
    rollout(AdapterField(backbone, None), noise, edit.sigmas(), torch.full((5,), 1), condition, callback)
    assert seen == {0: [0, 1, 2, 3, 4]}


def test_an_analytic_flow_lands_on_its_data():
    """v = (x − x0) / σ moves along a line: Euler is exact at every depth, whatever the grid."""
    x0, noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.randn(4, 3)
    sigmas, stop = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]), torch.tensor([4, 1, 3, 2])

    def field(x, sigma, condition):
        return (x - x0[condition.index]) / sigma[:, None]

    states = rollout(field, noise, sigmas, stop, Rows(4))
    level = sigmas[stop][:, None]
    assert torch.allclose(states, (1 - level) * x0 + level * noise, atol=1e-6)


@pytest.mark.parametrize("stop", [[7, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [1, 1]])
def test_stops_off_the_grid_are_refused(world, stop):
    backbone, edit, condition, noise = world
    with pytest.raises(ValueError, match="stop"):
        rollout(AdapterField(backbone, None), noise, edit.sigmas(), torch.tensor(stop), condition)


@pytest.mark.parametrize("name, order", [("euler", 1), ("ab2", 2)])
def test_solvers_have_their_order(name, order):
    """Halving every step divides the error by 2^order, on a flow whose exact path is a formula; one call a step."""
    flow, noise, errors = Gaussian(0.8, 0.4), torch.randn(64, 3, dtype=torch.float32), []
    for steps in (16, 32, 64):
        sigmas = shifted(steps, 3.0)
        stop = torch.full((64,), int(steps * 0.75))
        field = Counting(flow)
        x = rollout(field, noise, sigmas, stop, Rows(64), solver=SOLVERS[name]())
        mean, variance = flow.moments(sigmas[stop[0]])
        errors.append(float((x - (mean + variance.sqrt() * noise)).square().mean().sqrt()))
        assert field.rows == int(stop.sum())
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.2), errors


@pytest.mark.parametrize("solver", [Euler, AdamsBashforth])
def test_several_states_of_one_rollout_are_those_of_single_rollouts(world, solver):
    """K stops a row cost as many calls as the deepest alone, and are what rollouts of one stop each end at."""
    backbone, edit, condition, noise = world
    stops = torch.tensor([[3, 1], [0, 0], [2, 5], [4, 4], [6, 0]])
    field = Counting(AdapterField(backbone, "edit"))
    states = rollout(field, noise, edit.sigmas(), stops, condition, solver=solver())
    assert field.rows == int(stops.amax(1).sum())
    for k in range(2):
        alone = rollout(field.field, noise, edit.sigmas(), stops[:, k], condition, solver=solver())
        assert (states[:, k] - alone).abs().max() < 2e-5


@pytest.mark.parametrize("solver", [Euler, AdamsBashforth])
def test_a_level_between_grid_points_is_a_step_cut_short(world, solver):
    """As on a grid of the row's own that ends there; the way to deeper stops is not touched by it."""
    backbone, edit, condition, noise = world
    sigmas, field = edit.sigmas(), AdapterField(backbone, "edit")
    stops = torch.tensor([[2, 4], [1, 1], [3, 6], [4, 5], [6, 2]])
    share = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    levels = torch.lerp(sigmas[stops], sigmas[stops - 1], share)
    levels[1, 1] = sigmas[1]
    states = rollout(field, noise, sigmas, stops, condition, levels=levels, solver=solver())
    for i in range(5):
        for k in range(2):
            own = torch.cat([sigmas[: int(stops[i, k])], levels[i, k : k + 1]])
            end = torch.tensor([len(own) - 1])
            alone = rollout(field, noise[i : i + 1], own, end, condition.rows([i]), solver=solver())
            assert (states[i, k] - alone[0]).abs().max() < 2e-5, (i, k)


def test_levels_off_their_step_are_refused(world):
    backbone, edit, condition, noise = world
    sigmas, stops = edit.sigmas(), torch.full((5,), 3)
    for level in (float(sigmas[3]) - 0.01, float(sigmas[2]) + 0.01):
        with pytest.raises(ValueError, match="level must lie"):
            rollout(AdapterField(backbone, None), noise, sigmas, stops, condition, levels=torch.full((5,), level))


def test_ten_thousand_refreshes_leave_the_pristine_weights():
    """Every update merges anew from the weights as they were loaded: nothing drifts, and nothing is lost."""
    pipe = tiny_klein()
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    backbone = Backbone(pipe.transformer, family_of(pipe))
    targets = r"single_transformer_blocks\.0\.attn\.to_out|transformer_blocks\.0\.attn\.to_q"
    backbone.add_adapter("edit", random_adapter(pipe.transformer, targets=targets), trainable=True)
    first, second = backbone.parameters("edit")[:2]
    for step in range(10_000):
        with torch.no_grad():
            first.add_(1e-3 if step % 2 else -1e-3)
        with backbone.merged("edit"):
            pass
    after = {n.replace(".base_layer", ""): w for n, w in pipe.transformer.state_dict().items() if ".lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    layer = backbone._layers[backbone.modules("edit")[0]]
    path = backbone.modules("edit")[0]
    wanted = before[f"{path}.weight"] + layer.loras["edit"].scale * second @ first
    with backbone.merged("edit"):
        assert torch.allclose(layer.base_layer.weight, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_velocities_agree_to_the_dtypes_noise(dtype):
    """In bf16 they differ by no more than bf16 itself does from fp32, and both know the adapter."""
    adapter = random_adapter(tiny_klein().transformer, seed=1, size=0.15)
    pipe = tiny_klein()
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    condition = edit.conditions(["make it red"] * 2, [random_image(i) for i in range(2)])
    x, sigma = edit.noise([1, 2]), torch.tensor([0.9, 0.4])

    def velocities(dtype):
        pipe = tiny_klein()
        backbone = Backbone(pipe.transformer.to(dtype), family_of(pipe))
        backbone.add_adapter("edit", adapter)
        cast = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in condition.kwargs.items()}
        condition_cast = replace(condition, kwargs=cast)
        return [f(x, sigma, condition_cast) for f in (AdapterField(backbone, "edit"), MergedField(backbone, "edit"))]

    unmerged, merged = velocities(dtype)
    exact, _ = velocities(torch.float32)
    scale = float(exact.std())
    own = float((unmerged - exact).square().mean().sqrt()) / scale
    apart = float((merged - unmerged).square().mean().sqrt()) / scale
    assert apart <= (1e-5 if dtype == torch.float32 else 2 * own)
    assert own < 0.1
