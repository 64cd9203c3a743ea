"""The loop on a real, tiny FLUX.2 transformer: what it matches, where it asks, what it refuses, how it resumes."""

import pytest
import torch
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.backbone import Backbone
from danceopd.errors import UserError
from danceopd.fields import AdapterField
from danceopd.gates import full_trust
from danceopd.loop import STUDENT, Loop, Source
from danceopd.objectives import danceopd
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.recipe import Recipe
from danceopd.rollout import rollout

KLEIN = FAMILIES["flux2-klein"]
PROMPTS = ["a red circle", "a blue square", "two green stars", "a white ring"]


@pytest.fixture(scope="module")
def world():
    pipe = tiny_klein()
    draw = GenerationPipeline(pipe, KLEIN, CALL)
    edit = EditingPipeline(pipe, KLEIN, CALL)
    conditions = {
        "generation": draw.conditions(PROMPTS),
        "editing": edit.conditions(PROMPTS, [random_image(i) for i in range(4)]),
    }
    return conditions, draw.sigmas()


def make(world, files, teachers=None, init=None, **fields):
    """A loop whose two teachers are random adapters on a fresh tiny backbone."""
    conditions, sigmas = world
    backbone = Backbone(tiny_klein().transformer, KLEIN)
    sources = []
    for i, name in enumerate(("generation", "editing")):
        backbone.add_adapter(name, random_adapter(backbone.transformer, seed=i, size=0.1))
        field = (teachers or {}).get(name) or AdapterField(backbone, name)
        sources.append(Source(name, field, conditions[name]))
    recipe = Recipe(**files, **{"steps": 6, "batch": 6, "student": {"rank": 8}, **fields})
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init)
    return Loop(recipe, backbone, sources, sigmas, torch.device("cpu"))


def test_student_learns_its_teachers_on_its_own_states(world, files):
    loop = make(world, files, steps=60, batch=8, optimizer={"lr": 0.03, "warmup": 1}, query={"law": "uniform"})
    losses = []
    loop.run(lambda done: losses.append(done))
    early = sum(p.loss for p in losses[:10]) / 10
    late = sum(p.loss for p in losses[-10:]) / 10
    assert late < 0.5 * early
    assert set(losses[0].by_teacher) == {"generation", "editing"}
    assert all(p.gradient > 0 and not p.skipped for p in losses)


def test_teachers_are_asked_where_the_student_stopped(world, files, monkeypatch):
    """Each row is asked once, at the sigma of its query, on the state that the student itself walked to."""
    seen, walks = [], []

    def spy(x, sigma, condition):
        seen.append((x.clone(), sigma.clone(), condition))
        return torch.zeros_like(x)

    def watched(field, noise, sigmas, stop, condition):
        walks.append((noise.clone(), sigmas, stop.clone(), condition))
        return rollout(field, noise, sigmas, stop, condition)

    monkeypatch.setattr("danceopd.loop.rollout", watched)
    loop = make(world, files, {"generation": spy, "editing": spy}, batch=6, seed=3)
    loop._update()
    assert {c.context is None for _, _, c in seen} == {True, False}
    assert sum(len(x) for x, _, _ in seen) == 6 == sum(len(noise) for noise, *_ in walks)
    # A student of B = 0 is the base, so its walk is the base's own from the same noise.
    bare = Backbone(tiny_klein().transformer, KLEIN)
    for (x, sigma, _), (noise, sigmas, stop, condition) in zip(seen, walks):
        assert torch.equal(sigma, sigmas[stop])
        torch.testing.assert_close(x, rollout(AdapterField(bare, None), noise, sigmas, stop, condition))


def test_gradient_is_that_of_the_velocity_error(world, files):
    """One update's gradient equals autograd of the written-out loss at the recorded states."""
    asked = []
    loop = make(world, files, init=None)
    loop.sources = [
        Source(s.name, lambda x, sg, c, f=s.field: asked.append((x, sg, c, f(x, sg, c))) or asked[-1][3], s.conditions)
        for s in loop.sources
    ]
    loop.optimizer.step = lambda: None
    loop.optimizer.zero_grad = lambda set_to_none=True: None
    loop.recipe = loop.recipe.model_copy(
        update={"optimizer": loop.recipe.optimizer.model_copy(update={"clip": 1e9})}
    )
    loop._update()
    got = [p.grad.clone() for p in loop.parameters]
    for p in loop.parameters:
        p.grad = None
    total = 0.0
    with loop.backbone.acting_as(STUDENT):
        for x, sigma, condition, answer in asked:
            v = loop.backbone.velocity(x, sigma, condition)
            total = total + (v - answer).square().flatten(1).mean(1).sum()
    (total / loop.recipe.batch).backward()
    for a, b in zip(got, [p.grad for p in loop.parameters]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_restored_run_is_the_same_run(world, files):
    whole = make(world, files, ema=0.9)
    whole.run(lambda done: None)
    first = make(world, files, ema=0.9)
    for _ in range(3):
        first._update()
        first.step += 1
    state = {k: v.clone() for k, v in first.state().items()}
    second = make(world, files, ema=0.9)
    second.restore(3, state)
    second.run(lambda done: None)
    for a, b in zip(whole.average + whole.parameters, second.average + second.parameters):
        assert torch.equal(a, b)


def test_nan_is_skipped_then_refused(world, files):
    def broken(x, sigma, condition):
        return torch.full_like(x, float("nan"))

    loop = make(world, files, {"editing": broken}, steps=20)
    kept = [p.detach().clone() for p in loop.parameters]
    skipped = []
    with pytest.raises(UserError, match="NaN or infinite 5 updates in a row"):
        loop.run(lambda done: skipped.append(done.skipped))
    assert skipped == [True] * 4
    assert all(torch.equal(a, b) for a, b in zip(kept, loop.parameters))


def test_zero_gradient_is_refused(world, files):
    """Teachers equal to the student teach nothing: that is said, not trained."""
    adapter = random_adapter(tiny_klein().transformer, seed=0, size=0.1)
    loop = make(world, files, init=adapter)
    loop.sources = [Source(s.name, AdapterField(loop.backbone, STUDENT), s.conditions) for s in loop.sources]
    with pytest.raises(UserError, match="gradient is exactly zero"):
        loop._update()


def test_objective_points_at_the_teacher():
    """Descending the danceopd loss moves the student's velocity straight towards the answer."""
    student, answer = torch.randn(5, 4, 3, requires_grad=True), torch.randn(5, 4, 3)
    weight = full_trust(student, answer)
    danceopd(student, answer, weight).sum().backward()
    towards = (answer - student.detach()).flatten()
    cosine = torch.nn.functional.cosine_similarity(-student.grad.flatten(), towards, dim=0)
    assert cosine > 0.999
    assert weight.mean() == 1


def test_rate_warms_up_and_falls(world, files):
    loop = make(world, files, steps=100, optimizer={"lr": 1.0, "warmup": 10, "schedule": "cosine"})
    assert loop.rate(0) == pytest.approx(0.1, rel=1e-2)
    assert loop.rate(9) > loop.rate(50) > loop.rate(99)
    assert loop.rate(99) < 1e-3
