"""Scores of prompts and edits, and the suite that is made of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from danceopd.bench.suites.scenes import PROBES, Suite, render_image, total_variation
from danceopd.errors import UserError
from danceopd.worlds.scenes.edits import PROBE_TASKS, TASKS, Edit, edits
from danceopd.worlds.scenes.grammar import COLOURS, SHAPES, Scene, Thing, free_places
from danceopd.worlds.scenes.prompts import PROBE_TAGS, TAGS, Prompt, prompts
from danceopd.worlds.scenes.read import read, read_many, tier_of
from danceopd.worlds.scenes.render import render
from danceopd.worlds.scenes.score import judge, score_edit, score_prompt

RED_CIRCLE = Thing("circle", "red", 8, 24, 6)
BLUE_STAR = Thing("star", "blue", 40, 24, 6)
GREEN_CROSS = Thing("cross", "green", 56, 56, 6)
SCENE = Scene((RED_CIRCLE, BLUE_STAR, GREEN_CROSS), "sand", "flat")


def mixed(edit, share):
    return np.rint((1 - share) * render(edit.source).astype(float) + share * render(edit.target)).astype(np.uint8)


def static(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def score_prompts(tasks, images):
    """Read in one batch."""
    readings = read_many(images, tier_of(tasks[0].scene))
    return [score_prompt(task, one) for task, one in zip(tasks, readings, strict=True)]


def score_edits(tasks, images):
    """Read in one batch."""
    readings = read_many(images, tier_of(tasks[0].source))
    return [score_edit(task, one) for task, one in zip(tasks, readings, strict=True)]


def mean_o(tasks, images):
    return np.mean([s.o for s in score_edits(tasks, images)])


@pytest.fixture(scope="module", params=["cells", "free"])
def tasks(request):
    """Edits of all kinds, compound ones included."""
    tier, number = request.param, 60 if request.param == "cells" else 6
    return edits("train", number, tier=tier) + edits("train", number // 3, tasks=PROBE_TASKS, tier=tier)


# Prompts


@pytest.mark.parametrize("tier, number", [("cells", 240), ("free", 36)])
def test_the_scene_of_a_prompt_is_correct(tier, number):
    drawn = prompts("train", number, tier=tier) + prompts("train", 6, tags=PROBE_TAGS, tier=tier)
    scores = score_prompts(drawn, [render(p.scene) for p in drawn])
    assert all(s.correct and s.reason == "" for s in scores)


def test_other_scenes_are_mostly_wrong():
    ask, other = prompts("test", 60), prompts("test", 60, seed=1)
    assert np.mean([s.correct for s in score_prompts(ask, [render(p.scene) for p in other])]) < 0.2


def prompt(tag, include, exclude=()):
    return Prompt(tag, "", list(include), list(exclude), SCENE)


def test_the_checker_asks_class_count_colour_and_place():
    def says(include, things, exclude=()):
        return judge(prompt("", include, exclude), things)

    circle, star = {"class": "circle", "count": 1}, {"class": "star", "count": 1}
    both = (RED_CIRCLE, BLUE_STAR)
    assert says([circle, star], both).correct
    assert says([circle], both).correct, "more things than asked for are no fault, as in GenEval"
    assert says([circle, star], (RED_CIRCLE,)).reason == "a star expected, no star found"
    assert says([{**circle, "color": "red"}], both).correct
    wrong = says([{**circle, "color": "blue"}], both)
    assert not wrong.correct and wrong.reason == "a blue circle expected, no blue circle found: the circle is red"
    assert says([star, {**circle, "position": ["left of", 0]}], both).correct
    wrong = says([star, {**circle, "position": ["right of", 0]}], both)
    assert not wrong.correct and wrong.reason == "the circle is not right of the star"
    two = [RED_CIRCLE, replace(RED_CIRCLE, x=24.0)]
    ask = ([{"class": "circle", "count": 2}], [{"class": "circle", "count": 3}])
    assert says(ask[0], two, ask[1]).correct
    assert not says(ask[0], two[:1], ask[1]).correct
    three = says(ask[0], [*two, replace(RED_CIRCLE, x=56.0)], ask[1])
    assert not three.correct and three.reason == "3 circles found, fewer than 3 expected"


def test_what_is_no_scene_is_incorrect():
    anything = prompt("single_object", [])
    assert score_prompt(anything, render(SCENE)).correct
    verdict = score_prompt(anything, static(0))
    assert not verdict.correct and "not a readable scene" in verdict.reason
    patched = render(SCENE).copy()
    patched[:32, 32:] = static(1)[:32, 32:]
    assert not score_prompt(anything, patched).correct


# Edits


def test_calibration(tasks):
    """Target 10, copy and noise 0, a blend between, never falling on the way to the target."""
    targets = score_edits(tasks, [render(e.target) for e in tasks])
    assert {s.o for s in targets} == {10.0} and all(s.exact and s.reasons == () for s in targets)
    copies = score_edits(tasks, [render(e.source) for e in tasks])
    assert {s.o for s in copies} == {0.0} and not any(s.exact for s in copies) and all(s.reasons for s in copies)
    assert mean_o(tasks, [static(i) for i in range(len(tasks))]) == 0
    noisy = [np.clip(render(e.target) + np.random.default_rng(0).normal(0, 12.75, (64, 64, 3)), 0, 255) for e in tasks]
    assert 7 < mean_o(tasks, [np.rint(image).astype(np.uint8) for image in noisy]) < 9
    shares = (0.25, 0.5, 0.6, 0.75, 0.9) if len(tasks) > 20 else (0.25, 0.6)
    path = [0, *(mean_o(tasks, [mixed(e, share) for e in tasks]) for share in shares), 10]
    assert path == sorted(path) and path[1] < 1 < mean_o(tasks, [mixed(e, 0.6) for e in tasks]) < 9


def test_another_scene_scores_low(tasks):
    others = [render(e.target) for e in tasks[7:] + tasks[:7]]
    assert mean_o(tasks, others) < 2


def edit(task, goal, target, source=SCENE):
    group = "global" if task.endswith("_change") else "local"
    return Edit(task, group, task, source, target, goal)


REMOVE = edit("subject-remove", {"index": 0}, SCENE.with_thing(0, None))
RECOLOUR = edit(
    "color_alter", {"index": 0, "colour": "white"}, SCENE.with_thing(0, replace(RED_CIRCLE, colour="white"))
)
REPLACE = edit(
    "subject-replace", {"index": 0, "shape": "square", "colour": "black"},
    SCENE.with_thing(0, replace(RED_CIRCLE, shape="square", colour="black")),
)
TURN = edit(
    "subject-replace", {"index": 0, "shape": "square", "colour": None},
    SCENE.with_thing(0, replace(RED_CIRCLE, shape="square")),
)
ADDED = Thing("square", "yellow", 8, 40, 6)
ADD = edit(
    "subject-add", {"shape": "square", "colour": "yellow", "relation": "below", "anchor": 0},
    replace(SCENE, things=(*SCENE.things, ADDED)),
)
NIGHT = edit("style_change", {"style": "night"}, replace(SCENE, style="night"))
GRASS = edit("background_change", {"background": "grass"}, replace(SCENE, background="grass"))


def outcome(task, **changes):
    """The score of the task's target with its things or setting changed."""
    return score_edit(task, render(replace(task.target, **changes)))


def without(scene, *indices):
    return tuple(t for i, t in enumerate(scene.things) if i not in indices)


def test_wrong_colour():
    wrong = (replace(REPLACE.target.things[0], colour="purple"), *without(REPLACE.target, 0))
    score = outcome(REPLACE, things=wrong)
    assert score.success == 5 and score.over_editing == 10 and not score.exact
    assert score.reasons == ("the new square is purple, not black",)
    score = outcome(RECOLOUR, things=(replace(RED_CIRCLE, colour="purple"), BLUE_STAR, GREEN_CROSS))
    assert score.o == 0 and score.reasons == ("the circle is purple, not white",)
    # A colour that was not named has to stay.
    score = outcome(TURN, things=(replace(RED_CIRCLE, shape="square", colour="white"), BLUE_STAR, GREEN_CROSS))
    assert score.success == 10 and score.over_editing == pytest.approx(10 * (5 / 6 + 1) / 2)
    assert score.reasons == ("the red circle turned white",)
    # An untouched thing changes its colour: nothing about success, a fact and some pixels about the rest.
    score = outcome(REMOVE, things=(replace(BLUE_STAR, colour="white"), GREEN_CROSS))
    assert score.success == 10 and 5 < score.over_editing < 9.5
    assert score.reasons == ("the blue star turned white",)


def test_wrong_place():
    score = outcome(ADD, things=(*SCENE.things, replace(ADDED, x=8.0, y=8.0)))
    assert score.success == pytest.approx(20 / 3) and score.over_editing == 10
    assert score.reasons == ("the new square is not below the circle",)
    # Another place that the instruction allows is as right as the target's.
    score = outcome(ADD, things=(*SCENE.things, replace(ADDED, y=56.0)))
    assert score.o == 10 and score.exact and score.target_psnr is None
    score = outcome(REMOVE, things=(*REMOVE.target.things, replace(RED_CIRCLE, x=24.0)))
    assert score.success == 5 and "the red circle moved elsewhere instead of going" in score.reasons
    score = outcome(NIGHT, things=(replace(RED_CIRCLE, y=40.0), BLUE_STAR, GREEN_CROSS))
    assert score.success == 10 and score.over_editing < 9 and "the red circle moved" in score.reasons


def test_wrong_shape():
    score = outcome(RECOLOUR, things=(Thing("square", "white", 8, 24, 6), BLUE_STAR, GREEN_CROSS))
    assert score.success == 5 and score.reasons == ("the circle became a square",)
    score = outcome(REMOVE, things=(replace(RED_CIRCLE, shape="star"), BLUE_STAR, GREEN_CROSS))
    assert score.o == 0 and "the red circle became a red star instead of going" in score.reasons
    score = outcome(ADD, things=(*SCENE.things, replace(ADDED, shape="diamond")))
    assert score.o == 0 and "a yellow diamond was added, not a yellow square" in score.reasons


@pytest.mark.parametrize("task", [REMOVE, RECOLOUR, REPLACE, TURN, ADD, NIGHT, GRASS], ids=lambda t: t.task_type)
def test_an_extra_and_a_missing_thing_lose_points_and_break_exactness(task):
    x, y = free_places(task.target, 6.0, "cells")[-1]
    more = outcome(task, things=(*task.target.things, Thing("triangle", "orange", x, y, 6)))
    number = len(task.target.things)
    assert more.success == 10 and more.over_editing < 10 and not more.exact
    assert f"there are {number + 1} things, not {number}" in more.reasons
    index = next(i for i, t in enumerate(task.target.things) if t == BLUE_STAR)
    less = outcome(task, things=without(task.target, index))
    assert less.success == 10 and less.over_editing < 9 and not less.exact
    assert "the blue star is gone" in less.reasons


@pytest.mark.parametrize("task", [REMOVE, RECOLOUR, REPLACE, ADD, NIGHT, GRASS], ids=lambda t: t.task_type)
def test_the_ground_must_stay(task):
    changes = [("background", "checker"), ("style", "outline")]
    for what, value in changes:
        score = outcome(task, **{what: value})
        if task.goal.get(what):
            assert score.o == 0 and score.reasons == (f"the {what} is {value}, not {task.goal[what]}",)
        else:
            assert score.success == 10 and score.over_editing <= 9 and not score.exact
            assert any(reason.startswith(f"the {what} changed from") for reason in score.reasons)


def test_the_rest_of_the_picture_is_compared_with_the_source():
    dirty = render(REMOVE.target).astype(float)
    dirty[32:, :32] += 25
    score = score_edit(REMOVE, np.clip(dirty, 0, 255).astype(np.uint8))
    assert score.success == 10 and score.over_editing < 10
    # What the editor was given is what it had to keep.
    given = np.clip(render(SCENE).astype(float) + 6, 0, 255).astype(np.uint8)
    bright = np.clip(render(REMOVE.target).astype(float) + 6, 0, 255).astype(np.uint8)
    assert score_edit(REMOVE, bright, given).over_editing > score_edit(REMOVE, bright).over_editing - 1e-9
    # The edited region itself is free to change.
    assert score_edit(RECOLOUR, render(RECOLOUR.target)).over_editing == 10


def test_half_a_compound_edit_is_no_success():
    for task in edits("train", 8, tasks=PROBE_TASKS):
        first_only = replace(task.target, background=task.source.background, style=task.source.style)
        second_only = replace(task.source, background=task.target.background, style=task.target.style)
        assert score_edit(task, render(first_only)).o == 0
        half = score_edit(task, render(second_only))
        assert half.o == 0 and half.reasons


def test_images_arrays_and_readings_score_alike():
    image = render(NIGHT.target)
    expected = score_edit(NIGHT, image)
    assert score_edit(NIGHT, Image.fromarray(image)) == score_edit(NIGHT, read(image)) == expected
    assert expected.target_psnr == 60
    assert min(expected.success, expected.over_editing) == expected.sc
    assert min(expected.naturalness, expected.artifacts) == expected.pq


# The suite


@pytest.fixture(scope="module")
def suite():
    # The training split has eight times as many scenes as the test split, so it is drawn sooner.
    return Suite(split="train")


def right(items):
    return [render_image(i.task.scene) if i.capability == "generation" else i.target for i in items]


def test_the_suite_is_balanced_and_never_changes(suite):
    drawn, edited = suite.generation_items(), suite.editing_items()
    assert len(drawn) == len(edited) == 512
    for items, names in ((drawn, TAGS), (edited, TASKS)):
        numbers = [sum(i.category == name for i in items) for name in names]
        assert sum(numbers) == 512 and max(numbers) - min(numbers) <= 1
    probes = suite.probe_items()
    assert {i.probe for group in probes.values() for i in group} == set(PROBES)
    every = drawn + edited + probes["generation"] + probes["editing"]
    assert len({i.key for i in every}) == len(every) == 1024 + 64 * len(PROBES)
    assert all(i.source.size == (64, 64) for i in edited) and all(i.source is None for i in drawn)
    assert [i.key for i in suite.editing_items(30)] == [i.key for i in edited[:30]]
    assert Suite(split="train").protocol == suite.protocol and len(suite.protocol) == 64
    assert Suite(split="train", seed=1).protocol != suite.protocol
    assert Suite().split == "test" and Suite().tier == "cells"
    assert all(i.task.scene.split() == "test" for i in Suite().generation_items(12))


def test_right_images_get_everything(suite):
    items = suite.generation_items(60) + suite.editing_items(60)
    items += [item for group in suite.probe_items(6).values() for item in group]
    scores = suite.score(items, right(items))
    assert all(s.correct and s.reason == "" for s in scores)
    found = suite.summarise(scores)
    assert found["generation"]["overall"]["mean"] == 1 and found["editing"]["overall"]["mean"] == 10
    assert set(found["generation"]["categories"]) == set(TAGS) and set(found["editing"]["categories"]) == set(TASKS)
    assert found["editing"]["groups"]["local"]["n"] == 40 and found["editing"]["groups"]["global"]["n"] == 20
    assert set(found["probes"]) == set(PROBES) and found["probes"]["compound"]["mean"] == 10
    assert set(found["generation"]["diversity"]) == {"colour", "place", "background"}
    json.dumps(found)


def test_copies_get_nothing_and_say_why(suite):
    items = suite.editing_items(30)
    scores = suite.score(items, [i.source for i in items])
    assert suite.summarise(scores)["editing"]["overall"]["mean"] == 0
    assert all(s.reason and not s.correct for s in scores)
    with pytest.raises(UserError, match="30 items"):
        suite.score(items, [])


def test_the_ceiling_is_what_a_round_trip_leaves(suite):
    perfect = suite.ceiling(list, 24)
    assert perfect["read"] == 1 and perfect["n"] == 48
    assert perfect["generation"]["overall"] == 1 and perfect["editing"]["overall"] == 10

    def coarse(images):
        return [image.resize((16, 16), Image.Resampling.BOX).resize((64, 64)) for image in images]

    worse = suite.ceiling(coarse, 24)
    assert worse["read"] < 0.9 and worse["editing"]["overall"] < 8


def test_collapse_is_seen():
    law = np.full(8, 1 / 8)
    assert total_variation(np.full(8, 20.0), law)["distance"] == 0
    collapsed = total_variation(np.array([160.0] + [0] * 7), law)
    assert collapsed["distance"] == pytest.approx(7 / 8) and collapsed["chance"] < 0.15
    assert len(SHAPES) == 6 and len(COLOURS) == 8
