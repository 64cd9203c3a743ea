"""Walks over several updates: what is drawn, where they are asked, what they cost, and that they go on exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import check, launch, made
from test_loop import make, world
from test_resume import WEIGHTS, models, recipe
from tiny import random_adapter, tiny_klein

from danceopd.errors import UserError
from danceopd.fields import AdapterField
from danceopd.loop import STUDENT
from danceopd.merge import merge
from danceopd.persistent import Walks, life
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import record
from danceopd.plan import _passes, _queries
from danceopd.recipe import Recipe
from danceopd.rollout import rollout
from danceopd.run import RunFolder

__all__ = ["models", "world"]  # fixtures


def persistent(world, files, queries=4, batch=8, **fields):
    """A loop whose walks live for `queries` updates; its student is not the base."""
    walk = {"persistent": queries, **fields.pop("rollout", {})}
    start = random_adapter(tiny_klein().transformer, seed=9, size=0.1)
    return make(world, files, init=start, batch=batch, rollout=walk, **fields)


class Counting:
    """A field that counts the rows it is asked."""

    def __init__(self, field):
        self.field, self.rows = field, 0

    def __call__(self, x, sigma, condition):
        self.rows += len(x)
        return self.field(x, sigma, condition)


def updates(loop, count):
    for _ in range(count):
        yield loop._update()
        loop.step += 1


# What is drawn


def test_lives():
    """A slot's queries come in turn, its walks begin K updates apart, and none begins before the first update."""
    for slot in range(6):
        lives = [life(step, slot, 3) for step in range(12)]
        assert [due for _, due in lives] == [(step - slot) % 3 for step in range(12)]
        assert all(step - began <= 2 and began >= 0 for step, (began, _) in enumerate(lives))
        begun = Counter(began for began, _ in lives if 0 < began < 10)
        assert begun == {t: 3 for t in range(1, 10) if t % 3 == slot % 3}
    assert all(Counter(life(step, slot, 3)[1] for slot in range(6)) == {0: 2, 1: 2, 2: 2} for step in range(9))


def test_a_life_of_one_query_is_drawn_as_the_plain_loop_draws(world, files):
    plain = make(world, files, batch=8, guidance={"unconditional": 0.0}, query={"law": "low-noise"})
    assert plain.walks is None and not any(name.startswith("walk") for name in plain.state())
    lengths = [len(source.questions) for source in plain.sources]
    for plain.step in range(3):
        ours = Walks(plain.recipe).drawn(plain.step, plain.shares, lengths)
        theirs = plain._drawn()
        assert ours[:2] == theirs[:2] and (ours[2] == theirs[2]).all() and torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize("law, a, b", [("paper", 5, 2), ("low-noise", 2, 5)])
def test_queries_follow_the_law_and_fall(files, law, a, b):
    """Pooled over lives they are the law's own numbers, not only like them; within a life the noise falls."""
    walks = Walks(Recipe(**files, batch=64, rollout={"persistent": 4}, query={"law": law}))
    drawn = torch.cat([walks.drawn(step, [1.0], [9])[3] for step in range(3, 83)], 1)
    lives = [drawn[slot, (slot % 4 + 1) % 4 :][: 4 * 19].reshape(19, 4) for slot in range(64)]
    asked = torch.stack(lives)  # slots, lives, queries
    steps = asked.diff(dim=2)
    assert (steps >= 0).all() if law == "paper" else (steps <= 0).all()
    expected = np.sort(np.random.default_rng(0).beta(a, b, size=200_000))
    found = np.sort(asked.flatten().numpy())
    distance = np.abs(np.searchsorted(expected, found) / len(expected) - np.arange(len(found)) / len(found)).max()
    assert distance < 1.63 / np.sqrt(len(found)) + 0.003  # Kolmogorov's 1 %
    for update in drawn[:, :40].T:  # each update has walks of all ages, so it is near the law by itself
        assert abs(float(update.mean()) - a / (a + b)) < 4 * np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / 64)


# Walks in pieces


def test_rows_that_start_midway_end_where_whole_walks_end(world, files):
    """Each row at its own depth under its own sigma; no row is wasted; a start at 0 is the plain walk, bit for bit."""
    conditions, sigmas = world
    loop = make(world, files, init=random_adapter(tiny_klein().transformer, seed=9, size=0.1))
    field, condition = Counting(loop.walk), conditions["editing"]
    noise = torch.randn(4, *condition.shape, generator=torch.Generator().manual_seed(1))
    stops, start = torch.tensor([[6, 4], [3, 3], [2, 5], [4, 2]]), torch.tensor([2, 3, 0, 1])
    whole = rollout(loop.walk, noise, sigmas, stops, condition)
    zeros = rollout(loop.walk, noise, sigmas, stops, condition, start=torch.zeros(4, dtype=torch.long))
    assert torch.equal(whole, zeros)
    began = rollout(loop.walk, noise, sigmas, start, condition)
    seen = rollout(field, began, sigmas, stops, condition, start=start)
    assert field.rows == int((stops.amax(1) - start).sum())
    assert torch.equal(seen[1, 0], began[1])
    assert (seen - whole).abs().max() < 2e-5 and (whole[:, 0] - noise).abs().max() > 0.1
    levels = torch.lerp(sigmas[stops], sigmas[(stops - 1).clamp(min=0)], 0.4)
    levels[1] = sigmas[3]
    parts = rollout(loop.walk, began, sigmas, stops, condition, start=start, levels=levels)
    assert (parts - rollout(loop.walk, noise, sigmas, stops, condition, levels=levels)).abs().max() < 2e-5
    for wrong in (torch.tensor([5, 3, 0, 1]), torch.tensor([-1, 3, 0, 1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="behind its row's start"):
            rollout(loop.walk, began, sigmas, stops, condition, start=wrong)
    levels[1] = sigmas[3] + 0.01  # on a step that row 1 does not take
    with pytest.raises(ValueError, match="level must lie"):
        rollout(loop.walk, began, sigmas, stops, condition, start=start, levels=levels)


@pytest.mark.parametrize(
    "fields",
    [
        {"query": {"jitter": True, "law": "low-noise"}},
        {"query": {"jitter": True}, "rollout": {"merged": False, "guidance": 2.5}, "guidance": {"unconditional": 0.3}},
        {"query": {"law": "uniform"}, "micro_batch": 3},
    ],
)
def test_under_a_frozen_student_pieces_are_the_whole_walk(world, files, fields):
    """Every query lies on the walk from its life's noise, although it was walked to in pieces; nothing is asked twice.

    Rows of two layouts share each update.
    """
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 24}
    null = record(tiny_klein(), FAMILIES["flux2-klein"], prompt="", **call)[0] if "guidance" in fields else None
    loop = persistent(world, files, null=null, **fields)
    loop.walk = field = Counting(loop.walk)
    guided = 2 if "guidance" in fields else 1
    deepest, layouts, between = Counter(), set(), 0
    for loop.step in range(7):
        slots, before = [], field.rows
        walked = 0
        for lesson in loop._lessons():
            held = {slot: loop.walks.held[slot].at for slot in lesson.slots if slot in loop.walks.held}
            states = lesson.walk(lesson.stops, lesson.levels)
            walked += sum(int(stop) - held.get(slot, 0) for slot, stop in zip(lesson.slots, lesson.stops[:, 0]))
            count, slots = field.rows, slots + lesson.slots
            noise = torch.stack([loop.walks.noise(loop.step, slot, lesson.condition.shape) for slot in lesson.slots])
            lives = [life(loop.step, slot, 4)[0] for slot in lesson.slots]
            deepest.update({(slot, began): 0 for slot, began in zip(lesson.slots, lives)})
            lesson.noise = lambda noise=noise: noise
            whole = type(lesson).__mro__[1].walk(lesson, lesson.stops, lesson.levels)
            assert (states - whole).abs().max() < 5e-5
            field.rows = count
            layouts.add(lesson.condition.context is None)
            between += int((lesson.levels != lesson.sigmas[lesson.stops]).sum())
            assert fields.get("micro_batch", 8) >= len(lesson.mine)
        assert sorted(slots) == list(range(8)) and field.rows - before == guided * walked
    assert layouts == {True, False} and (between > 20) == ("jitter" in fields["query"])
    assert len(deepest) > 8  # several lives


def test_each_leg_is_walked_under_the_student_of_its_update(world, files):
    loop = persistent(world, files, query={"law": "uniform"})
    seen = {}
    for loop.step in range(2):
        for lesson in loop._lessons():
            rests = {slot: walk for slot, walk in loop.walks.held.items() if slot in lesson.slots}
            states = lesson.walk(lesson.stops, lesson.levels)[:, 0]
            student = AdapterField(loop.backbone, STUDENT)
            for row, slot in enumerate(lesson.slots):
                if slot in rests:
                    start, at = torch.tensor([rests[slot].at]), lesson.stops[row, :1]
                    one = lesson.condition.rows([row])
                    wanted = rollout(student, rests[slot].here[None], lesson.sigmas, at, one, start=start)
                    assert (states[row] - wanted[0]).abs().max() < 2e-5
                    seen[slot] = int(at - start)
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter.mul_(1.5)
    assert len(seen) == 6 and max(seen.values()) > 0


# Updates


def test_every_update_asks_each_slot_once_and_nothing_grows_stale(world, files):
    asked = []

    def spy(x, sigma, condition):
        asked.append(len(x))
        return torch.zeros_like(x)

    loop = persistent(world, files, 3, 7, teachers={"generation": spy, "editing": spy}, steps=9)
    for step, done in enumerate(updates(loop, 6)):
        assert sum(asked) == 7 and sum(done.asked) == pytest.approx(1)
        asked.clear()
        ages = [step - life(step, slot, 3)[0] for slot in range(7)]
        scalars = done.scalars()
        assert scalars["staleness"] == pytest.approx(sum(ages) / 7) and scalars["staleness/max"] == max(ages) <= 2
        assert set(loop.walks.held) == {slot for slot in range(7) if life(step, slot, 3)[1] < 2}
    assert max(ages) == 2
    assert "staleness" not in make(world, files)._update().scalars()


def test_it_costs_what_the_plan_says(world, files):
    """Forwards of a row in an update: the deepest of K queries over K; a third of a whole walk's for K = 4."""
    _, sigmas = world
    cost = {}
    for queries in (1, 4):
        fields = {"batch": 8, "steps": 100, "query": {"law": "uniform", "jitter": True}}
        loop = make(world, files, rollout={"persistent": queries, "steps": 6}, **fields)
        loop.walk = Counting(lambda x, sigma, condition: x)
        for loop.step in range(100):
            for lesson in loop._lessons():
                lesson.walk(lesson.stops, lesson.levels)
        walked = _queries(loop.recipe, {(64, 64): sigmas}, [{"size": (64, 64)}])["walked"]
        cost[queries] = _passes(loop.recipe, walked)["walk"]
        assert loop.walk.rows / (100 * 8) == pytest.approx(cost[queries], rel=0.05)
    assert cost[4] < 0.45 * cost[1]


def test_the_student_comes_nearer_its_teachers(world, files):
    fields = {"optimizer": {"lr": 0.003, "warmup": 1}, "query": {"law": "uniform"}, "rollout": {"persistent": 3}}
    loop = make(world, files, **fields)
    x = torch.randn(4, *world[0]["editing"].shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3])

    def away():
        student, asked = AdapterField(loop.backbone, STUDENT), [s.questions.rows([0, 1, 2, 3]) for s in loop.sources]
        both = zip(loop.sources, asked)
        return sum(float((student(x, sigma, c) - s.field(x, sigma, c)).square().mean()) for s, c in both)

    before = away()
    list(updates(loop, 16))
    assert away() < 0.93 * before


def test_a_broken_walk_begins_anew(world, files):
    """What a NaN left behind is dropped with the update that it spoilt; the other walks go on."""
    loop = persistent(world, files)
    list(updates(loop, 2))
    slot, kept = 1, set(loop.walks.held) - {1}  # slot 1 began in update 1 and has three more queries
    loop.walks.held[slot].here.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in loop.state().items() if name.startswith("weight")}
    done = list(updates(loop, 1))
    assert done[0].skipped and all(torch.equal(loop.state()[name], tensor) for name, tensor in before.items())
    assert slot not in loop.walks.held and kept & set(loop.walks.held)
    done = list(updates(loop, 1))
    assert not done[0].skipped and loop.walks.held[slot].began == 3


# Going on


@pytest.mark.parametrize("jitter", [False, True])
def test_a_restored_run_is_the_same_run(world, files, jitter):
    """Saved in the middle of lives, through a file; without its walks it would be another run."""
    fields = {"steps": 7, "ema": 0.9, "query": {"jitter": jitter}, "optimizer": {"lr": 0.01, "warmup": 1}}
    whole = persistent(world, files, 3, **fields)
    whole.run(lambda done: None)
    first = persistent(world, files, 3, **fields)
    list(updates(first, 4))
    folder = RunFolder("run", first.recipe)
    folder.save(4, first.state(), {})
    saved = folder.load()
    folder.close()
    held = [name for name in saved.tensors if name.startswith("walk.")]
    assert len(held) == 2 * len(first.walks.held) > 6
    ends = []
    for tensors in (saved.tensors, {name: t for name, t in saved.tensors.items() if name not in held}):
        second = persistent(world, files, 3, **fields)
        second.restore(4, tensors)
        second.run(lambda done: None)
        pairs = zip(whole.average + whole.parameters, second.average + second.parameters)
        ends.append([torch.equal(a, b) for a, b in pairs])
    assert all(ends[0]) and not any(ends[1])


def test_a_stopped_merge_goes_on_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done, steps):
        if done.step == 3:
            raise Stop

    walk = {"rollout": {"steps": 3, "persistent": 3}, "query": {"jitter": True}}
    fields = {"steps": 6, "save_every": 2, "gap": {"every": 0}, **walk}
    merge(recipe(models, tmp_path / "whole", **fields), lambda done, steps: None)
    with pytest.raises(Stop):
        merge(recipe(models, tmp_path / "run", **fields), stop)
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "state.safetensors")
    assert any(name.startswith("walk.") for name in state)
    steps = []
    merge(recipe(models, tmp_path / "run", **fields), lambda done, total: steps.append(done.step))
    assert steps == [3, 4, 5, 6]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    plain = recipe(models, tmp_path / "run", **{**fields, "rollout": {"steps": 3}})
    with pytest.raises(UserError, match=r"rollout.persistent is 3 there and 1 here"):
        merge(plain, stop)


# Several processes


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_slots_for_ever(world, files, ranks):
    """Each slot has one process, of even numbers and all ages; the processes' gradients add up to one process's."""
    alone, *parts = (
        persistent(world, files, 3, 9, rank=rank, ranks=count, query={"jitter": True})
        for rank, count in [(0, 1), *((rank, ranks) for rank in range(ranks))]
    )
    owned = [[slot for slot in range(9) if part.walks.mine(slot)] for part in parts]
    assert sorted(sum(owned, [])) == list(range(9)) and max(map(len, owned)) - min(map(len, owned)) <= 1
    assert all({slot % 3 for slot in mine} == {0, 1, 2} for mine in owned)
    for step in range(4):
        for loop in (alone, *parts):
            loop.step = step
            loop.optimizer.zero_grad()
            for lesson in loop._lessons():
                loop.objective(lesson)
        for whole, *each in zip(*(loop.parameters for loop in (alone, *parts))):
            torch.testing.assert_close(sum(one.grad for one in each), whole.grad, rtol=1e-3, atol=1e-6)
    saved = {name: tensor for part in parts for name, tensor in part.walks.state().items()}
    assert saved.keys() == alone.walks.state().keys()
    parts[0].gather = lambda mine: [part.walks.state() for part in parts]
    assert set(saved) <= set(parts[0].state())
    other = Walks(alone.recipe, 0, 1)  # as many processes as you like
    other.restore(saved, alone.device)
    assert other.held.keys() == alone.walks.held.keys()


@pytest.mark.slow
def test_two_processes_make_the_student_of_one(models: Path, tmp_path: Path) -> None:
    """Two updates by two processes, two by two with the base sharded, two by one, all amid the same lives."""
    fields = {"rollout": {"steps": 3, "persistent": 3}, "query": {"jitter": True}}
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = {}
    for steps in (2, 4, 6):
        merge(made(models, one, steps=steps, **fields), lambda done, total: None)
        wanted[steps] = load_file(one / WEIGHTS)
    assert max((wanted[2][name] - wanted[6][name]).abs().max() for name in wanted[2]) > 1e-4
    launch(made(models, two, steps=2, **fields), tmp_path)
    check(two, wanted[2])
    launch(made(models, two, steps=4, parallel="fsdp", **fields), tmp_path)
    check(two, wanted[4])
    merge(made(models, two, steps=6, **fields), lambda done, total: None)
    check(two, wanted[6])
    states = [load_file(folder / "checkpoints" / "step-000004" / "state.safetensors") for folder in (one, two)]
    held = [{name: t for name, t in state.items() if name.startswith("walk.")} for state in states]
    assert held[0].keys() == held[1].keys() and len(held[0]) == 4
    for name, tensor in held[0].items():
        torch.testing.assert_close(held[1][name], tensor, atol=1e-4, rtol=1e-4)


# Refusals


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"objective": "diffusionopd"}, "objective diffusionopd does not"),
        ({"objective": "flowopd", "rollout": {"noise": 0.7}}, "objective flowopd does not"),
        ({"objective": "supervised"}, "objective supervised has no student walk"),
        ({"query": {"count": 2}}, "query.count is 2"),
        ({"rollout": {"solver": "ab2"}}, "leave out rollout.solver ab2"),
        ({"rollout": {"noise": 0.5}}, "leave out rollout.noise"),
        ({"gates": {"evidence": True}}, "as gates do"),
        ({"routing": {"per": "step"}}, "routing.per step"),
        ({"routing": {"per": "turn"}}, "routing.per turn"),
    ],
)
def test_what_makes_no_sense_is_refused(files, fields, says):
    walk = {**fields.get("rollout", {}), "persistent": 2}
    with pytest.raises(UserError, match=says) as refused:
        Recipe(**{**files, **fields, "rollout": walk})
    assert "\n" not in str(refused.value)
    if fields["rollout"] if "rollout" in fields else fields.get("objective") != "supervised":
        Recipe(**{**files, **fields})  # it is the walk over several updates that is refused
