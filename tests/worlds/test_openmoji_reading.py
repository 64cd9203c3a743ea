"""Reading and scoring pictures of drawings made for these tests: exactness, tolerances, and the cost of errors."""

import io
from dataclasses import replace

import numpy as np
import pytest
from own_drawings import NAMES, pixels
from PIL import Image, ImageFilter

from danceopd.worlds.openmoji.colours import colour_word
from danceopd.worlds.openmoji.kinds import COLOURLESS, LINES, STYLES, rgb
from danceopd.worlds.openmoji.render import SIDE, compose, put, render
from danceopd.worlds.openmoji.score import read_edit, score_edit, score_prompt
from danceopd.worlds.openmoji.tasks import edits, prompts
from danceopd.worlds.scenes.edits import TASKS, Edit
from danceopd.worlds.scenes.grammar import Scene, Thing
from danceopd.worlds.scenes.prompts import Prompt


def score(reader, edit, image):
    return score_edit(edit, read_edit(reader, edit, image), reader.drawings)


# ---- reading


def facts(scene, hidden=""):
    things = sorted((t.shape, "" if "c" in hidden else t.colour, round(t.x), round(t.y), t.size) for t in scene.things)
    return things, scene.style, "" if "b" in hidden else scene.background


def test_clean_pictures_are_read_right(reader, drawings):
    wrong = []
    for prompt in prompts("val", 6, 3, NAMES):
        if facts(reader.read(render(prompt.scene, drawings)).scene) != facts(prompt.scene):
            wrong.append(prompt.scene.key())
    for edit in edits("val", 6, 3, NAMES):
        hidden = ("c" if edit.target.style in COLOURLESS else "") + ("b" if edit.target.style in LINES else "")
        if facts(read_edit(reader, edit, render(edit.target, drawings)).scene, hidden) != facts(edit.target, hidden):
            wrong.append(edit.target.key())
    assert wrong == []


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_read_on_every_background(reader, drawings, style):
    for background in ("white", "beach"):
        things = (Thing("car", "red", 18, 20, 11), Thing("clock", "blue", 44, 44, 8))
        scene = Scene(things, background, style)
        reading = reader.read(render(scene, drawings), things)
        hidden = "b" if style in LINES else ""
        assert facts(reading.scene, hidden) == facts(scene, hidden)
        assert reading.psnr > 26 and reading.unexplained < 0.01


def test_what_is_moved_within_the_limits_is_still_there(reader, drawings):
    old = Thing("car", "red", 30, 30, 11)
    for moved, still in ((replace(old, x=32, y=29), True), (replace(old, size=10), True), (replace(old, x=38), False)):
        reading = reader.read(render(Scene((moved,), "sky", "plain"), drawings), (old,))
        assert ((reading.scene.things[0].x, reading.scene.things[0].size) == (30, 11)) == still, moved
        assert reading.found[0].x == pytest.approx(moved.x, abs=0.3)


def test_a_drawing_may_look_to_the_other_side_and_be_of_another_size(reader, drawings):
    scene = Scene((Thing("chair", "green", 30, 30, 8),), "white", "plain")
    turned = Image.fromarray(np.asarray(render(scene, drawings))[:, ::-1].copy())
    seen = reader.read(turned)
    assert seen.scene.things[0].shape == "chair" and seen.likeness[0] > 0.95
    large = Scene((Thing("car", "blue", 32, 32, 25),), "white", "plain")
    things = reader.read(render(large, drawings)).scene.things
    assert [(t.shape, t.colour) for t in things] == [("car", "blue")] and things[0].size == pytest.approx(25, abs=1)


def test_any_shade_of_a_colour_is_that_colour():
    shades = {"#0000ff": "blue", "#ff0000": "red", "#7b3f00": "brown", "#f5f5f5": "white", "#228b22": "green"}
    assert {fill: colour_word(np.array(rgb(fill)) / 255) for fill in shades} == shades


def test_what_is_like_no_drawing_is_no_drawing(reader, drawings):
    rng = np.random.default_rng(0)
    for patches in (1, 40):
        picture = np.array(compose(Scene((Thing("car", "red", 16, 16, 11),), "white", "plain"), drawings))
        if patches == 1:
            picture[300:460, 280:480] = rng.random((40, 50, 3)).repeat(4, 0).repeat(4, 1)
        else:  # like a book by its outlines, and worse than nothing when a book is drawn there
            for x, y in rng.integers(300, 440, (patches, 2)):
                picture[y : y + 20, x : x + 20] = rng.random(3)
        reading = reader.read(Image.fromarray((picture * 255).astype(np.uint8)))
        assert [t.shape for t in reading.scene.things] == ["car", "something"]
        assert reading.unexplained > 0.03


def test_an_unknown_ground_is_called_other(reader, drawings):
    picture = np.full((SIDE, SIDE, 3), (0.75, 0.72, 0.7), np.float32)
    put(picture, Thing("apple", "green", 30, 30, 11), drawings, "plain")
    reading = reader.read(Image.fromarray((picture * 255).astype(np.uint8)))
    assert reading.scene.background == "other"
    assert [(t.shape, t.colour) for t in reading.scene.things] == [("apple", "green")]


# ---- scoring


@pytest.mark.parametrize("task", TASKS)
def test_the_target_gets_ten_and_a_copy_or_noise_nothing(reader, drawings, task):
    rng = np.random.default_rng(0)
    for edit in edits("train", 1, 2, NAMES, (task,)):
        right = score(reader, edit, render(edit.target, drawings))
        assert right.o == pytest.approx(10) and right.exact and right.reasons == ()
        copy = score(reader, edit, render(edit.source, drawings))
        assert copy.o == copy.success == 0 and copy.reasons
        noise = score(reader, edit, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        assert noise.o == 0


def test_noise_and_an_empty_sheet_get_nothing(reader, drawings):
    black = edit_of("color_alter", "make the car black", SOURCE, SOURCE.with_thing(0, replace(CAR, colour="black")), {})
    black.goal.update(index=0, colour="black")
    styles = [
        Edit("style_change", "global", "", SOURCE, replace(SOURCE, style=style), {"style": style})
        for style in ("no outlines", "line drawing")
    ]
    for seed, edit in enumerate((black, *styles)):
        noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        assert score(reader, edit, noise).o == 0
        assert score(reader, edit, Image.new("RGB", (SIDE, SIDE), "white")).o == 0


def spoilt(image, how, by):
    if how == "jpeg":
        out = io.BytesIO()
        image.save(out, "JPEG", quality=by)
        return Image.open(out)
    if how == "blur":
        return image.filter(ImageFilter.GaussianBlur(by))
    if how == "shift":
        return Image.fromarray(np.pad(np.asarray(image), ((by, 0), (by, 0), (0, 0)), "edge")[:SIDE, :SIDE])
    grain = np.random.default_rng(0).normal(0, by * 255, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "how, by, least, most",
    [("jpeg", 40, 9, 10), ("noise", 0.08, 9, 10), ("blur", 2, 8.5, 10), ("shift", 4, 7, 9.95), ("blur", 6, 3, 9)],
)
def test_small_faults_cost_little(reader, drawings, how, by, least, most):
    asked = edits("train", 6, 4, NAMES)
    found = [score(reader, edit, spoilt(render(edit.target, drawings), how, by)).o for edit in asked]
    assert least <= np.mean(found) <= most


def test_half_an_edit_is_worth_something_between(reader, drawings):
    asked = edits("train", 6, 5, NAMES)
    half = [Image.blend(render(e.source, drawings), render(e.target, drawings), 0.5) for e in asked]
    found = [score(reader, edit, image) for edit, image in zip(asked, half)]
    assert 1 < np.mean([one.o for one in found]) < 7
    ghosts = [one for edit, one in zip(asked, found) if edit.task_type == "subject-remove"]
    assert all(one.o == 0 and "traces" in " ".join(one.reasons) for one in ghosts)


def edit_of(task, instruction, source, target, goal):
    return Edit(task, "local", instruction, source, target, goal)


CAR, CLOCK = Thing("car", "red", 16, 16, 11), Thing("clock", "white", 44, 44, 8)
SOURCE = Scene((CAR, CLOCK), "meadow", "plain")


def test_over_editing_is_seen(reader, drawings):
    blue = SOURCE.with_thing(0, replace(CAR, colour="blue"))
    edit = edit_of("color_alter", "make the car blue", SOURCE, blue, {"index": 0, "colour": "blue"})
    both = score(reader, edit, render(blue.with_thing(1, replace(CLOCK, colour="blue")), drawings))
    assert both.success == 10 and both.over_editing < 8 and "the white clock turned blue" in both.reasons
    night = score(reader, edit, render(replace(blue, background="night"), drawings))
    assert night.success == 10 and night.over_editing < 5 and not night.exact
    more = score(reader, edit, render(replace(blue, things=(*blue.things, Thing("kite", "pink", 50, 14, 8))), drawings))
    assert more.success == 10 and more.over_editing < 9 and "there are 3 things, not 2" in more.reasons


def test_another_shade_is_the_colour_that_was_asked_for(reader, drawings):
    blue = SOURCE.with_thing(0, replace(CAR, colour="blue"))
    edit = edit_of("color_alter", "make the car blue", SOURCE, blue, {"index": 0, "colour": "blue"})
    picture = pixels(blue, drawings).copy()
    body = np.zeros((SIDE, SIDE), bool)
    body[40:216, 40:216] = drawings.body("car", 176) > 0.9
    picture[body] = (0.1, 0.2, 0.8)
    found = score(reader, edit, (picture * 255).astype(np.uint8))
    assert found.success == 10 and found.o > 8
    picture[body] = (0.1, 0.7, 0.2)
    assert score(reader, edit, (picture * 255).astype(np.uint8)).success == 0


def test_a_new_thing_must_stand_where_it_was_asked_for_and_may_stand_anywhere_there(reader, drawings):
    kite = Thing("kite", "pink", 46, 16, 8)
    goal = {"shape": "kite", "colour": "pink", "relation": "right of", "anchor": 0}
    edit = edit_of("subject-add", "add", SOURCE, replace(SOURCE, things=(CAR, CLOCK, kite)), goal)
    for x, y, done in ((54, 20, 10), (16, 50, 20 / 3)):
        image = render(replace(SOURCE, things=(CAR, CLOCK, replace(kite, x=x, y=y))), drawings)
        found = score(reader, edit, image)
        assert found.success == pytest.approx(done) and found.over_editing == pytest.approx(10)
    wrong = score(reader, edit, render(replace(SOURCE, things=(CAR, CLOCK, replace(kite, shape="apple"))), drawings))
    assert wrong.success == 0 and "a pink apple was added, not a pink kite" in wrong.reasons


def test_prompts_are_checked_as_geneval_does(reader, drawings):
    for prompt in prompts("train", 6, 6, NAMES):
        assert score_prompt(prompt, reader.read(render(prompt.scene, drawings))).correct, prompt.prompt
    three = Scene(tuple(Thing("apple", "red", x, 20, 8) for x in (12, 32, 52)), "white", "plain")
    two = Prompt("counting", "", [{"class": "apple", "count": 2}], [{"class": "apple", "count": 3}], three)
    assert "3 apples found" in score_prompt(two, reader.read(render(three, drawings))).reason
    green = Prompt("colors", "", [{"class": "apple", "count": 1, "color": "green"}], [], three)
    assert not score_prompt(green, reader.read(render(three, drawings))).correct


def test_quality_falls_with_blur_and_with_what_nothing_explains(reader, drawings):
    gone = SOURCE.with_thing(1, None)
    edit = edit_of("subject-remove", "remove the clock", SOURCE, gone, {"index": 1})
    soft = score(reader, edit, spoilt(render(gone, drawings), "blur", 10))
    assert soft.success == 10 and 2 < soft.naturalness < 8
    marked = np.array(render(gone, drawings))
    marked[300:340, 40:160] = np.random.default_rng(0).integers(0, 256, (40, 120, 3))
    found = score(reader, edit, marked)
    assert found.success == 10 and 1 < found.artifacts < 9 and found.pq == found.artifacts
