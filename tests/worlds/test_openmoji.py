"""The openmoji world and suite, on drawings made for these tests: fetching, rendering, tasks, scores."""

import hashlib
import json
import os
import stat
import sys
from dataclasses import replace

import numpy as np
import own_drawings
import pytest
from own_drawings import NAMES, pixels
from PIL import ImageFilter
from typer.testing import CliRunner

from danceopd.bench.scoring import score_row
from danceopd.bench.suites.openmoji import Suite
from danceopd.bench.suites.registry import load_suite
from danceopd.cli.app import app
from danceopd.data.images import picture
from danceopd.errors import UserError
from danceopd.worlds.openmoji import fetch
from danceopd.worlds.openmoji.colours import colour_word
from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.kinds import COLOURS, KINDS, STYLES, plural, rgb
from danceopd.worlds.openmoji.render import SIDE, cover, render
from danceopd.worlds.openmoji.score import editable
from danceopd.worlds.openmoji.tasks import edits, prompts, shows
from danceopd.worlds.scenes.edits import TASKS, Edit
from danceopd.worlds.scenes.facts import checks
from danceopd.worlds.scenes.grammar import Scene, Thing
from danceopd.worlds.scenes.prompts import TAGS


@pytest.fixture
def suite(drawings, reader, tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "cache"))
    made = Suite(data=drawings.folder, kinds=own_drawings.KINDS, each=3)
    made.drawings, made.reader = drawings, reader  # the rasters and templates that are there already
    return made


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """The package of our own drawings, its checksum pinned."""
    file = own_drawings.package(tmp_path / "openmoji-17.0.0.tgz")
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "cache"))
    return file


def some_edits(task: str, count: int) -> list[Edit]:
    return edits("train", count, 0, NAMES, (task,))


# ---- fetching


def test_a_package_is_unpacked_with_its_licence_and_attribution(own_package, tmp_path):
    place = fetch.fetch(own_package, kinds=own_drawings.KINDS)
    assert place == tmp_path / "cache" / "openmoji" / fetch.VERSION == fetch.require()
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    wanted = {f"color/svg/{kind.file}.svg" for kind in own_drawings.KINDS}
    assert files == wanted | {"LICENSE.txt", "ATTRIBUTION.txt", "openmoji.json"}
    assert "OpenMoji" in (place / "ATTRIBUTION.txt").read_text() and "CC BY-SA 4.0" in fetch.ATTRIBUTION
    facts = json.loads((place / "openmoji.json").read_text())
    drawing = place / "color/svg/own-car.svg"
    assert facts["files"]["color/svg/own-car.svg"] == hashlib.sha256(drawing.read_bytes()).hexdigest()
    own_package.unlink()
    assert fetch.fetch(kinds=own_drawings.KINDS) == place  # nothing more is fetched


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(own_package, tmp_path):
    with own_package.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="is not npm package openmoji 17.0.0"):
        fetch.fetch(own_package, kinds=own_drawings.KINDS)
    with pytest.raises(UserError, match="is no file"):
        fetch.fetch(tmp_path / "nowhere.tgz")
    assert not (tmp_path / "cache").exists()


def test_a_package_without_a_drawing_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    file = own_drawings.package(tmp_path / "part.tgz", without="kite")
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="own-kite.svg"):
        fetch.fetch(file, tmp_path / "there" / "drawings", own_drawings.KINDS)
    assert list((tmp_path / "there").iterdir()) == []


def fake_npm(folder, script):
    """A program named npm that is found first."""
    path = folder / "npm"
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_npm_fetches_the_pinned_version(own_package, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    script = (
        "assert sys.argv[1:3] == ['pack', 'openmoji@17.0.0']\n"
        f"shutil.copy({str(own_package)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])"
    )
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", script) + os.pathsep + os.environ["PATH"])
    assert fetch.fetched(fetch.fetch(kinds=own_drawings.KINDS))


def test_npm_that_fails_or_is_missing_says_what_else_helps(own_package, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PATH", fake_npm(tmp_path / "bin", "sys.exit('network unreachable')"))
    with pytest.raises(UserError, match="network unreachable.*--from openmoji-17.0.0.tgz"):
        fetch.fetch(kinds=own_drawings.KINDS)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="npm was not found.*--from"):
        fetch.fetch(kinds=own_drawings.KINDS)
    assert not fetch.fetched(fetch.default_folder())


def test_without_drawings_the_suite_says_which_command_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run `danceopd openmoji fetch` once"):
        load_suite("openmoji")
    with pytest.raises(UserError, match="elsewhere"):
        load_suite("openmoji", data=tmp_path / "elsewhere")


def test_the_command_refuses_with_one_sentence(own_package, tmp_path):
    own_package.write_bytes(b"other")
    result = CliRunner().invoke(app, ["openmoji", "fetch", "--from", str(own_package)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "sha256" in result.stderr


def test_the_command_says_whose_drawings_they_are(own_package, monkeypatch):
    monkeypatch.setattr(fetch.fetch, "__defaults__", (None, None, own_drawings.KINDS))
    result = CliRunner().invoke(app, ["openmoji", "fetch", "--from", str(own_package)])
    assert result.exit_code == 0 and fetch.ATTRIBUTION in result.stdout


# ---- drawings and pictures


def test_recolouring_changes_the_body_alone(drawings):
    red, blue = (drawings.sprite("car", colour, "all", 128) for colour in ("red", "blue"))
    assert np.array_equal(red.alpha, blue.alpha)
    body = drawings.body("car", 128)
    inside = body > 0.99
    assert inside.mean() > 0.1
    assert np.allclose(red.colour[inside], np.array(rgb(COLOURS["red"][0])) / 255)
    assert np.allclose(blue.colour[inside], np.array(rgb(COLOURS["blue"][0])) / 255)
    outside = (body < 0.01) & (red.alpha > 0.99)
    dot = red.colour[66, 64]  # (36, 38) of the drawing, in the line work
    assert np.allclose(dot, np.array(rgb("#ea5a47")) / 255, atol=0.02) and outside[66, 64]
    assert outside.mean() > 0.05 and np.allclose(red.colour[outside], blue.colour[outside], atol=0.01)


def test_layers_are_drawn_apart_and_fill_the_square(drawings):
    for name in NAMES:
        line, bare, both = (drawings.sprite(name, "red", layers, 96) for layers in ("line", "color", "all"))
        if name != "car":  # whose line work has a dot
            assert np.all(line.colour[line.alpha > 0.9] < 0.02), name  # lines are black
        assert not np.array_equal(bare.alpha, both.alpha)
        tall, wide = both.alpha.any(1).mean(), both.alpha.any(0).mean()
        assert max(tall, wide) > 0.97, name
    assert drawings.boxes["clock"] == pytest.approx((36, 36, 27), abs=0.2)


def test_drawings_that_are_not_layered_are_refused(tmp_path):
    folder = own_drawings.write(tmp_path / "drawings")
    file = folder / "color/svg/own-car.svg"
    whole = file.read_text()
    for text, said in (
        (whole.replace('id="line"', 'id="other"'), "no layers color and line"),
        (whole.replace("#ea5a47", "#123456"), "no fill #ea5a47"),
        (whole[:100], "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            Drawings(folder, own_drawings.KINDS)
    file.unlink()
    with pytest.raises(UserError, match="the drawing of car"):
        Drawings(folder, own_drawings.KINDS)


def test_the_table_of_classes_is_sound():
    assert len(KINDS) == len({kind.name for kind in KINDS}) == len({kind.file for kind in KINDS}) == 43
    assert all(fill.startswith("#") and len(fill) == 7 for kind in KINDS for fill in (kind.body, *kind.shade))
    assert [plural(n) for n in ("car", "bus", "sheep", "couch")] == ["cars", "buses", "sheep", "couches"]
    assert {colour_word(np.array(rgb(fills[0])) / 255) == word for word, fills in COLOURS.items()} == {True}


@pytest.mark.parametrize("task", TASKS)
def test_source_and_target_differ_within_the_mask_alone(drawings, task):
    for edit in some_edits(task, 4):
        source, target = pixels(edit.source, drawings), pixels(edit.target, drawings)
        away = np.abs(source - target).max(-1) > 0.02
        mask = editable(edit, drawings, SIDE)
        assert away.any() and not (away & ~mask).any(), edit.instruction
        if task not in ("background_change", "style_change"):
            assert mask.mean() < 0.8


# ---- tasks


def test_tasks_are_the_same_every_time_and_never_shared_between_splits():
    assert edits("test", 24, 0, NAMES) == edits("test", 24, 0, NAMES) != edits("test", 24, 1, NAMES)
    assert prompts("val", 12, 0, NAMES) == prompts("val", 12, 0, NAMES)
    for edit in edits("test", 24, 0, NAMES):
        assert edit.source.split() == edit.target.split() == "test"
    for prompt in prompts("val", 12, 0, NAMES):
        assert prompt.scene.split() == "val"


def test_a_target_meets_its_goal_and_its_source_does_not():
    for edit in edits("train", 120, 0, NAMES):
        asked, kept = checks(edit, edit.target)
        assert all(check.holds for check in (*asked, *kept)), edit.instruction
        asked, _ = checks(edit, edit.source)
        assert not all(check.holds for check in asked if check.primary), edit.instruction


def test_a_named_thing_is_the_only_one_of_its_name():
    for edit in edits("train", 240, 1, NAMES):
        if edit.task_type in ("subject-remove", "subject-replace", "color_alter"):
            thing = edit.source.things[edit.goal["index"]]
            named = edit.instruction.split("the ", 1)[1]
            full = named.startswith(f"{thing.colour} {thing.shape}")
            assert full or named.startswith(thing.shape)
            twins = [t for t in edit.source.things if t.shape == thing.shape and (not full or t.colour == thing.colour)]
            assert twins == [thing], edit.instruction


def test_a_style_is_asked_for_only_where_it_shows():
    white = Scene((Thing("car", "white", 20, 20, 8),), "white", "plain")
    assert not any(shows(white, style) for style in ("plain", "no outlines", "line drawing", "grayscale"))
    assert shows(white, "negative") and shows(replace(white, background="sky"), "grayscale")
    seen = {edit.goal["style"] for edit in some_edits("style_change", 60)}
    assert seen == set(STYLES) - {"plain"}


# ---- the suite


def test_the_suite_gives_items_in_turn_with_pictures_on_disk(suite):
    made, asked = suite.generation_items(), suite.editing_items()
    assert len(made) == len(asked) == 18 and [i.category for i in made[:6]] == list(TAGS)
    assert [i.category for i in asked[:6]] == list(TASKS) and len({i.key for i in (*made, *asked)}) == 36
    assert suite.editing_items(2)[1].key == asked[1].key and suite.probe_items() == {"generation": [], "editing": []}
    first = asked[0]
    assert picture(first.source).size == picture(first.target).size == picture(first.mask).size == (SIDE, SIDE)
    before = first.source.stat().st_mtime_ns
    assert suite.editing_items(1)[0].source.stat().st_mtime_ns == before
    assert suite.image_path(first) == f"subject-add/{first.key}.png" and suite.source_path(first) is None
    assert np.asarray(picture(first.mask)).min() == 0 and np.asarray(picture(first.mask)).max() == 255
    assert fetch.ATTRIBUTION in json.dumps(suite.rules)


def test_the_protocol_follows_the_drawings_and_the_tasks(suite, tmp_path):
    folder = own_drawings.write(tmp_path / "other")
    assert Suite(folder, kinds=own_drawings.KINDS, each=3).protocol == suite.protocol
    assert Suite(folder, kinds=own_drawings.KINDS, each=3, seed=1).protocol != suite.protocol
    file = folder / "color/svg/own-car.svg"
    file.write_text(file.read_text().replace("#92d3f5", "#61b2e4"))
    assert Suite(folder, kinds=own_drawings.KINDS, each=3).protocol != suite.protocol


def test_the_suite_scores_pictures_of_any_size_as_plain_rows(suite):
    items = suite.editing_items(2) + suite.generation_items(1)
    wide = picture(items[0].target).resize((640, 480))
    small = picture(items[1].target).resize((256, 256))
    drawn = render(items[2].task.scene, suite.drawings)
    rows = [score_row(one) for one in suite.score(items, [wide, small, drawn])]
    assert [round(row["score"]) for row in rows] == [10, 10, 1]
    assert json.loads(json.dumps(rows)) == rows and {"sc", "pq", "seen", "likeness"} <= set(rows[0]["parts"])
    with pytest.raises(UserError, match="3 items of suite openmoji got 1 images"):
        suite.score(items, [wide])


def test_the_ceiling_of_a_perfect_round_trip_is_the_top(suite):
    perfect = suite.ceiling(lambda images: images, 3)
    assert perfect["read"] == 1 and perfect["n"] == 6
    assert perfect["generation"]["overall"] == 1 and perfect["editing"]["overall"] == pytest.approx(10)
    worse = suite.ceiling(lambda images: [image.filter(ImageFilter.GaussianBlur(9)) for image in images], 3)
    assert worse["editing"]["overall"] < 9


CAR = Thing("car", "red", 16, 16, 11)


def test_a_thing_covers_what_it_is_drawn_on(drawings):
    scene = Scene((CAR,), "pink", "plain")
    empty = pixels(replace(scene, things=()), drawings)
    away = np.abs(pixels(scene, drawings) - empty).max(-1) > 0.5
    mask = cover((CAR,), drawings, SIDE)
    assert (away & ~mask).sum() == 0 and away.sum() > 0.5 * mask.sum()
