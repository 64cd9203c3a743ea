"""Synthetic scenes: splits, prompts, edits and rendering."""

import random
from dataclasses import replace

import numpy as np
import pytest

from danceopd.errors import UserError
from danceopd.worlds.scenes.edits import LOCAL, PROBE_TASKS, TASKS, edits
from danceopd.worlds.scenes.grammar import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    HELDOUT_OPERATIONS,
    IMAGE,
    SHAPES,
    STYLES,
    Scene,
    Thing,
    free_places,
    has_heldout_binding,
    is_heldout_binding,
    relations,
)
from danceopd.worlds.scenes.prompts import PROBE_TAGS, TAGS, prompts
from danceopd.worlds.scenes.render import object_mask, render


def scenes_of(split, number=240):
    """Every scene that a split shows, probes included."""
    found = [p.scene for p in prompts(split, number)]
    for edit in edits(split, number) + edits(split, number // 10, tasks=PROBE_TASKS):
        found += [edit.source, edit.target]
    return found


@pytest.fixture(scope="module")
def by_split():
    return {split: scenes_of(split, 600 if split == "train" else 60) for split in ("train", "val", "test")}


def test_splits_are_disjoint_and_stable(by_split):
    keys = {split: {scene.key() for scene in scenes} for split, scenes in by_split.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["val"] and not keys["val"] & keys["test"]
    for split, scenes in by_split.items():
        assert {scene.split() for scene in scenes} == {split}
    assert [e.instruction for e in edits("test", 12)] == [e.instruction for e in edits("test", 24)][:12]
    assert prompts("val", 12, seed=3) == prompts("val", 12, seed=3) != prompts("val", 12, seed=4)


def test_a_scene_is_the_same_in_any_order():
    one, two = Thing("star", "red", 8, 8, 6), Thing("circle", "blue", 24, 8, 6)
    assert Scene((one, two), "gray", "flat").key() == Scene((two, one), "gray", "flat").key()
    assert Scene((one,), "gray", "flat").key() != Scene((one,), "gray", "night").key()


def test_heldout_is_one_colour_a_shape():
    for shape in SHAPES:
        assert sum(is_heldout_binding(shape, colour) for colour in COLOURS) == 1


@pytest.mark.parametrize("tier", ["cells", "free"])
def test_no_heldout_binding_or_operation_in_training_data(tier):
    number = 600 if tier == "cells" else 48
    drawn = prompts("train", number, tier=tier)
    edited = edits("train", number, tier=tier)
    for scene in [p.scene for p in drawn] + [e.source for e in edited] + [e.target for e in edited]:
        assert not has_heldout_binding(scene)
    operations = {(e.task_type, e.goal.get("shape")) for e in edited}
    assert not operations & HELDOUT_OPERATIONS
    assert "compound" not in {e.task_type for e in edited} and "counting-five" not in {p.tag for p in drawn}


def test_heldout_sets_ask_for_what_training_lacks():
    assert all(has_heldout_binding(p.scene) for p in prompts("test", 24, heldout=True))
    assert all(has_heldout_binding(e.target) for e in edits("test", 24, heldout="binding"))
    for edit in edits("test", 24, heldout="operation"):
        assert (edit.task_type, edit.goal["shape"]) in HELDOUT_OPERATIONS
        assert not has_heldout_binding(edit.target) and not has_heldout_binding(edit.source)


def named(words, things):
    """The things that an expression such as ``leftmost red circle`` can mean."""
    words = words.split()
    found = list(things)
    for word in words:
        if word in SHAPES:
            found = [t for t in found if t.shape == word]
        elif word in COLOURS:
            found = [t for t in found if t.colour == word]
    if words[0] in ("leftmost", "rightmost") and found:
        edge = (min if words[0] == "leftmost" else max)(t.x for t in found)
        found = [t for t in found if t.x == edge]
    return found


@pytest.mark.parametrize("tier", ["cells", "free"])
def test_expressions_name_one_thing_alone(tier):
    heads = ("remove the ", "take away the ", "replace the ", "turn the ", "make the ", "change the colour of the ")
    tasks = ("subject-remove", "subject-replace", "color_alter")
    for edit in edits("train", 300 if tier == "cells" else 30, tasks=tasks, tier=tier):
        words = next(edit.instruction.removeprefix(h) for h in heads if edit.instruction.startswith(h))
        for stop in (" with ", " into ", " to "):
            words = words.split(stop)[0]
        if edit.task_type == "color_alter" and edit.instruction.startswith("make"):
            words = words.rsplit(" ", 1)[0]
        assert named(words, edit.source.things) == [edit.source.things[edit.goal["index"]]], edit.instruction


def test_an_edit_changes_what_it_says_and_nothing_else():
    for edit in edits("train", 300):
        source, target, goal = edit.source, edit.target, edit.goal
        assert source.key() != target.key()
        if edit.task_type in LOCAL:
            assert (source.background, source.style) == (target.background, target.style)
        else:
            assert source.things == target.things
        if edit.task_type == "subject-add":
            assert target.things[:-1] == source.things
            if "anchor" in goal:
                assert goal["relation"] in relations(target.things[-1], source.things[goal["anchor"]])
        elif edit.task_type == "subject-remove":
            assert target == source.with_thing(goal["index"], None)


def test_categories_are_balanced():
    assert [p.tag for p in prompts("val", 12)] == [*TAGS, *TAGS]
    assert [e.task_type for e in edits("train", 12)] == [*TASKS, *TASKS]
    assert {p.tag for p in prompts("test", 3, tags=PROBE_TAGS)} == set(PROBE_TAGS)
    assert all(len(p.scene.things) == 5 for p in prompts("test", 3, tags=PROBE_TAGS))


def test_relations_follow_genevals_rule():
    def at(x, y, size=6.0):
        return Thing("circle", "red", x, y, size)

    assert relations(at(8, 8), at(24, 8)) == {"left of"}
    assert relations(at(24, 8), at(8, 8)) == {"right of"}
    assert relations(at(8, 8), at(8, 24)) == {"above"}
    assert relations(at(24, 24), at(8, 8)) == {"right of", "below"}
    assert relations(at(24, 8), at(8, 56)) == {"above"}
    # A tenth of both widths is slack: no relation within it.
    assert relations(at(8, 8), at(10, 8)) == frozenset()


def test_pictures_are_exact_and_styles_injective():
    scene = Scene((Thing("star", "green", 24, 40, 6),), "sky", "flat")
    picture = render(scene)
    assert picture.shape == (IMAGE, IMAGE, 3) and picture.dtype == np.uint8
    assert (picture == render(scene)).all()
    assert tuple(picture[40, 24]) == (30, 150, 60)
    pictures = {
        render(replace(scene, background=b, style=s)).tobytes() for b in BACKGROUNDS for s in STYLES
    }
    assert len(pictures) == len(BACKGROUNDS) * len(STYLES)


def test_a_thing_of_a_cell_stays_in_its_cell():
    for shape in SHAPES:
        mask = object_mask(Thing(shape, "red", 24, 40, 6))
        assert 40 < mask.sum() < CELL * CELL
        mask[32:48, 16:32] = False
        assert not mask.any()


def test_free_things_keep_their_distance():
    for prompt in prompts("train", 30, tier="free"):
        things = prompt.scene.things
        for i, one in enumerate(things):
            assert one.size <= one.x <= IMAGE - one.size
            for two in things[:i]:
                gap = max(abs(one.x - two.x), abs(one.y - two.y)) - one.size - two.size
                assert gap >= 4
    assert free_places(Scene((), "gray", "flat"), 8, "free")[0] == (9.0, 9.0)


def test_places_and_grounds_are_uniform():
    rng = random.Random(0)
    drawn = prompts("train", 600, seed=rng.randrange(100))
    grounds = [sum(p.scene.background == b for p in drawn) for b in BACKGROUNDS]
    assert min(grounds) > 80


@pytest.mark.parametrize("draw", [prompts, edits])
def test_an_unknown_split_is_refused_at_once(draw):
    with pytest.raises(UserError, match="no split is named 'validate'; did you mean 'val'"):
        draw("validate", 1)
