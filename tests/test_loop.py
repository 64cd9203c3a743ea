"""The loop on a real, tiny FLUX.2 transformer: what it matches, where it asks, what it refuses, how it resumes."""

import pytest
import torch
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.backbone import Backbone
from danceopd.errors import UserError
from danceopd.fields import AdapterField, GuidedField, MergedField
from danceopd.lesson import Lesson
from danceopd.loop import STUDENT, Loop, Source
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import record
from danceopd.questions import Questions, TargetedQuestions, alike, unprompted
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


def make(world, files, teachers=None, init=None, work=None, null=None, rank=0, ranks=1, **fields):
    """A loop whose two teachers are random adapters on a fresh tiny backbone."""
    conditions, sigmas = world
    backbone = Backbone(tiny_klein().transformer, KLEIN)
    sources = []
    for i, name in enumerate(("generation", "editing")):
        backbone.add_adapter(name, random_adapter(backbone.transformer, seed=i, size=0.1))
        field = (teachers or {}).get(name) or AdapterField(backbone, name)
        questions = (work or {}).get(name) or Questions([(conditions[name], sigmas)])
        sources.append(Source(name, field, questions, null))
    recipe = Recipe(**files, **{"steps": 6, "batch": 6, "student": {"rank": 8}, **fields})
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init)
    return Loop(recipe, backbone, sources, torch.device("cpu"), rank, ranks)


def test_student_learns_its_teachers_on_its_own_states(world, files):
    loop = make(world, files, steps=45, batch=6, optimizer={"lr": 0.03, "warmup": 1}, query={"law": "uniform"})
    losses = []
    loop.run(lambda done: losses.append(done))
    early = sum(p.loss for p in losses[:5]) / 5
    late = sum(p.loss for p in losses[-5:]) / 5
    assert late < 0.6 * early
    assert set(losses[0].by_teacher) == {"generation", "editing"}
    assert all(p.gradient > 0 and not p.skipped for p in losses)


def test_what_is_logged_is_what_was_learnt(world, files, monkeypatch):
    """The histogram of the queries, errors by noise level and losses by teacher, reckoned from the rows themselves."""
    rows = []
    learn = Lesson.learn

    def watched(lesson, surrogate, sigma, error, *rest, **more):
        names = ("generation", "editing")
        rows.extend(zip([names[m] for m in lesson.routes], sigma.tolist(), surrogate.tolist(), error.tolist()))
        learn(lesson, surrogate, sigma, error, *rest, **more)

    monkeypatch.setattr(Lesson, "learn", watched)
    loop = make(world, files, batch=12, query={"law": "uniform", "jitter": True, "count": 2, "weight": "dt2"})
    logged = loop._update().scalars()
    assert len(rows) == 24 and len({int(sigma * 10) for _, sigma, _, _ in rows}) > 4
    for i in range(10):
        share = sum(i <= sigma * 10 < i + 1 for _, sigma, _, _ in rows) / 24
        assert logged[f"asked/sigma {i / 10:g}-{(i + 1) / 10:g}"] == pytest.approx(share)
    for i in range(4):
        errors = [error for _, sigma, _, error in rows if i <= sigma * 4 < i + 1]
        wanted = pytest.approx(sum(errors) / len(errors), rel=1e-5) if errors else None
        assert logged.get(f"error/sigma {i / 4:g}-{(i + 1) / 4:g}") == wanted
    for name in ("generation", "editing"):
        losses = [loss for whose, _, loss, _ in rows if whose == name]
        assert logged[f"loss/{name}"] == pytest.approx(sum(losses) / (len(losses) / 2), rel=1e-5)


def test_teachers_are_asked_where_the_student_stopped(world, files, monkeypatch):
    """Each row is asked once, at the sigma of its query, on the state that the student itself walked to."""
    seen, walks = [], []

    def spy(x, sigma, condition):
        seen.append((x.clone(), sigma.clone(), condition))
        return torch.zeros_like(x)

    def watched(field, noise, sigmas, stop, condition, **how):
        walks.append((noise.clone(), sigmas, stop[:, 0].clone(), condition))
        return rollout(field, noise, sigmas, stop, condition, **how)

    monkeypatch.setattr("danceopd.lesson.rollout", watched)
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
        Source(s.name, lambda x, sg, c, f=s.field: asked.append((x, sg, c, f(x, sg, c))) or asked[-1][3], s.questions)
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
    loop.sources = [Source(s.name, loop.walk, s.questions) for s in loop.sources]
    with pytest.raises(UserError, match="gradient is exactly zero"):
        loop._update()


def test_rate_warms_up_and_falls(world, files):
    loop = make(world, files, steps=100, optimizer={"lr": 1.0, "warmup": 10, "schedule": "cosine"})
    assert loop.rate(0) == pytest.approx(0.1, rel=1e-2)
    assert loop.rate(9) > loop.rate(50) > loop.rate(99)
    assert loop.rate(99) < 1e-3
    loop = make(world, files, steps=100, optimizer={"lr": 1.0, "warmup": 10, "schedule": "linear"})
    assert [loop.rate(step) for step in (0, 50, 99)] == pytest.approx([0.1, 0.5, 0.01], abs=1e-6)


def targeted(world):
    """The same work, with a clean picture for each row."""
    conditions, sigmas = world
    clean = torch.Generator().manual_seed(7)
    return {
        name: TargetedQuestions([(c, sigmas)], [torch.randn(len(c), *c.shape, generator=clean)])
        for name, c in conditions.items()
    }


@pytest.mark.parametrize(
    "objective, fields",
    [
        ("danceopd", {"query": {"count": 2, "jitter": True, "law": "low-noise"}, "rollout": {"solver": "ab2"}}),
        ("danceopd", {"rollout": {"merged": False, "noise": 0.5}}),
        ("danceopd", {"routing": {"per": "turn", "groups": 2}, "query": {"weight": "dt2", "law": "uniform"}}),
        ("diffusionopd", {}),
        ("diffusionopd", {"rollout": {"noise": 0.7}}),
        ("flowopd", {"rollout": {"noise": 0.7}, "flowopd": {"group": 4}}),
        ("offpolicy", {}),
        ("offpolicy", {"offpolicy": {"clean": "teacher"}}),
        ("supervised", {}),
    ],
)
def test_every_objective_brings_the_student_nearer(world, files, objective, fields):
    """The same update again and again, with all its draws: the loss falls."""
    work = targeted(world) if objective in ("offpolicy", "supervised") else None
    optimizer = {"lr": 0.01, "warmup": 1}
    loop = make(world, files, work=work, batch=4, objective=objective, optimizer=optimizer, **fields)
    done = [loop._update() for _ in range(4)]
    assert done[-1].loss < 0.97 * done[0].loss, [p.loss for p in done]
    assert all(p.gradient > 0 and not p.skipped and sum(p.asked) == pytest.approx(1, abs=1e-5) for p in done)
    assert done[0].errors and set(done[0].errors) <= {0, 1, 2, 3}


@pytest.mark.parametrize("objective", ["offpolicy", "supervised"])
def test_objectives_without_their_data_are_refused(world, files, objective):
    with pytest.raises(UserError, match=f"objective {objective} learns from finished pictures.*'generation'"):
        make(world, files, objective=objective)


def test_unmerged_walks_are_the_merged_ones(world, files):
    loops = [make(world, files, rollout={"merged": merged}) for merged in (True, False)]
    for loop in loops:
        loop._update()
    assert [type(loop.walk) for loop in loops] == [MergedField, AdapterField]
    for a, b in zip(*(loop.parameters for loop in loops)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["danceopd", "flowopd"])
def test_processes_share_an_update(world, files, objective):
    """Two processes' gradients, each of its own rows, add up to that of one process; so do their rows."""
    fields = {"rollout": {"noise": 0.7}, "flowopd": {"group": 2}} if objective == "flowopd" else {}
    grads, rows = [], []
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        loop = make(world, files, batch=10, objective=objective, rank=rank, ranks=ranks, **fields)
        lessons = list(loop._lessons())
        for lesson in lessons:
            loop.objective(lesson)
        grads.append([p.grad.clone() for p in loop.parameters])
        rows.append(sum(len(lesson.mine) for lesson in lessons))
    assert rows[0] == 10 == rows[1] + rows[2] and min(rows) > 0
    for whole, a, b in zip(*grads):
        torch.testing.assert_close(a + b, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["danceopd", "flowopd"])
def test_a_batch_learnt_in_slices_is_the_batch(world, files, objective):
    """Eight slices or one: the same draws, the same gradient to fp32 noise, the same figures."""
    fields = {"batch": 16, "objective": objective, "query": {"jitter": True}}
    if objective == "flowopd":
        fields = {"batch": 16, "objective": objective, "rollout": {"noise": 0.7}, "flowopd": {"group": 2}}
    seen = []
    for micro in (None, 2):
        loop = make(world, files, micro_batch=micro, **fields)
        lessons = list(loop._lessons())
        assert micro is None or (len(lessons) >= 8 and max(len(lesson.mine) for lesson in lessons) == micro)
        for lesson in lessons:
            loop.objective(lesson)
        seen.append([p.grad.clone() for p in loop.parameters])
        loop.optimizer.zero_grad()
        seen.append(loop._update())
    (whole, figures), (parts, again) = seen[:2], seen[2:]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert again.scalars() == pytest.approx(figures.scalars(), rel=1e-3, abs=1e-6)


def test_a_process_without_rows_takes_part(world, files):
    """It adds zeros, and learns what the others have learnt: the same bits, the same figures."""
    sent = []
    alone = make(world, files, batch=1)
    first = make(world, files, batch=1, rank=0, ranks=2)
    second = make(world, files, batch=1, rank=1, ranks=2)
    first.add, second.add = lambda t: sent.append(t.clone()), lambda t: t.add_(sent.pop(0))
    for _ in range(3):
        done = [loop._update() for loop in (first, second, alone)]
        for loop in (first, second, alone):
            loop.step += 1
        assert not sent and done[0].scalars() == done[1].scalars() == done[2].scalars()
    assert not list(second._lessons())
    for a, b, c in zip(first.average, second.average, alone.average):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_fp16_skips_a_loss_scale_that_is_too_large_and_lowers_it(world, files):
    """An infinite gradient is the scale's fault until the scale is 1; then it counts, and the scale is resumed."""
    loop = make(world, files, dtype="fp16", steps=9)
    exact = make(world, files, steps=9)
    done = loop._update()
    assert not done.skipped and done.scale == 2.0**16 and done.gradient == pytest.approx(exact._update().gradient, 1e-4)
    loop.parameters[0].register_hook(lambda gradient: gradient / 0)
    assert loop._update().skipped and loop._bad == 0 and loop.scaler.get_scale() == 2.0**15
    loop.scaler.update(1.0)
    assert loop._update().skipped and loop._bad == 1
    again = make(world, files, dtype="fp16", steps=9)
    again.restore(1, loop.state())
    assert again.scaler.state_dict() == loop.scaler.state_dict() and again._bad == 1


def test_buckets_of_other_sizes_and_schedules_share_no_batch(world, files):
    """Rows of one layout meet across teachers; another schedule or another layout makes another lesson."""
    conditions, sigmas = world
    other = torch.cat([torch.linspace(1, 0.1, 4), torch.zeros(1)])
    drawn, edited = conditions["generation"], conditions["editing"]
    work = {
        "generation": Questions([(drawn.rows(slice(0, 2)), sigmas), (drawn.rows(slice(2, 4)), other)]),
        "editing": Questions([(drawn, sigmas), (edited, other)]),
    }
    loop = make(world, files, work=work, batch=32)
    lessons = list(loop._lessons())
    assert sum(len(lesson.mine) for lesson in lessons) == 32 and len(lessons) == 3
    seen = {(lesson.condition.context is None, len(lesson.sigmas)): set(lesson.routes) for lesson in lessons}
    assert seen == {(True, 7): {0, 1}, (True, 5): {0}, (False, 5): {1}}
    loop._update()
    mixed = work["generation"]
    assert len(mixed) == 4 and torch.equal(mixed.sigmas(3), other) and alike(mixed, 4) == [0, 1, 2, 3]
    assert alike(work["editing"], 9) == [0, 1, 2, 3]
    for key in KLEIN.prompt_kwargs:
        assert torch.equal(mixed.rows([3, 0, 2]).kwargs[key], drawn.kwargs[key][[3, 0, 2]])
    with pytest.raises(IndexError):
        mixed.layout(4)


# Guidance


@pytest.fixture(scope="module")
def null():
    return record(tiny_klein(), KLEIN, prompt="", height=64, width=64, num_inference_steps=6, max_sequence_length=24)[0]


def absorbing(world, files, null, share, **fields):
    """A loop whose teachers are guided at 3, and what they say themselves, with and without."""
    loop = make(world, files, null=null, guidance={"unconditional": share}, **fields)
    plain = [source.field for source in loop.sources]
    loop.sources = [Source(s.name, GuidedField(s.field, null, 3.0), s.questions, null) for s in loop.sources]
    return loop, plain


def test_blank_rows_are_asked_with_the_null_prompt_and_answered_without_guidance(world, files, null):
    loop, plain = absorbing(world, files, null, 0.4, batch=32)
    blanks = 0
    for lesson in loop._lessons():
        x, sigma = lesson.noise(), torch.full((len(lesson.mine),), 0.7)
        answer = lesson.ask(x, sigma)
        for i, (m, blank) in enumerate(zip(lesson.routes, lesson.blank)):
            one = lesson.condition.rows([i])
            empty = unprompted(one, null)
            same = all(torch.equal(one.kwargs[key], empty.kwargs[key]) for key in KLEIN.prompt_kwargs)
            assert same == blank
            field = plain[m] if blank else loop.sources[m].field
            torch.testing.assert_close(answer[i], field(x[i : i + 1], sigma[:1], one)[0], atol=1e-4, rtol=1e-3)
            assert (one.context is None) == (m == 0)  # the source image stays
            blanks += blank
    assert 4 <= blanks <= 24


def test_absorbed_guidance_does_not_compound_when_the_null_prompt_is_taught_too(world, files, null):
    """A guided student should stand where the guided teacher would: with a null branch left to drift, it does not."""
    away = {}
    for share in (0.0, 0.3):
        loop, plain = absorbing(
            world,
            files,
            null,
            share,
            steps=24,
            batch=8,
            optimizer={"lr": 0.02, "warmup": 1},
            query={"law": "high-noise", "beta": (30.0, 1.0)},  # walks of hardly a step
        )
        loop.run(lambda done: None)
        student = AdapterField(loop.backbone, STUDENT)
        error = {"null": 0.0, "told": 0.0}
        for m, source in enumerate(loop.sources):
            condition = source.questions.rows([0, 1, 2, 3])
            x = torch.randn(4, *condition.shape, generator=torch.Generator().manual_seed(5))
            sigma, blank = torch.full((4,), 1.0), unprompted(condition, null)
            error["null"] += float((student(x, sigma, blank) - plain[m](x, sigma, blank)).square().mean())
            error["told"] += float((student(x, sigma, condition) - source.field(x, sigma, condition)).square().mean())
        away[share] = error
    assert away[0.3]["null"] < 0.5 * away[0.0]["null"], away
    assert away[0.3]["told"] < 2 * away[0.0]["told"], away


def test_guided_walks_are_the_stock_guidance_of_the_student(world, files, null):
    """`rollout.guidance` walks on the guided student, and neither teacher nor student's own answer is guided by it."""
    start = random_adapter(tiny_klein().transformer, seed=9)
    loop = make(world, files, null=null, rollout={"guidance": 2.5}, init=start)
    for lesson in loop._lessons():
        states = lesson.walk(lesson.stops, lesson.levels)[:, 0]
        guided = GuidedField(AdapterField(loop.backbone, STUDENT), null, 2.5)
        wanted = rollout(guided, lesson.noise(), lesson.sigmas, lesson.stops[:, 0].clone(), lesson.condition)
        torch.testing.assert_close(states, wanted, atol=1e-3, rtol=1e-3)
        bare = rollout(guided.field, lesson.noise(), lesson.sigmas, lesson.stops[:, 0], lesson.condition)
        assert int(lesson.stops.max()) == 0 or (states - bare).abs().max() > 1e-2
        sigma = torch.full((len(states),), 0.5)
        for i, m in enumerate(lesson.routes):
            alone = loop.sources[m].field(states[i : i + 1], sigma[:1], lesson.condition.rows([i]))
            torch.testing.assert_close(lesson.ask(states, sigma)[i], alone[0], atol=1e-4, rtol=1e-3)


def test_the_null_prompt_is_asked_for_where_it_is_missing(world, files):
    for fields in ({"guidance": {"unconditional": 0.1}}, {"rollout": {"guidance": 2.0}}):
        with pytest.raises(UserError, match="needs the null prompt"):
            make(world, files, **fields)
