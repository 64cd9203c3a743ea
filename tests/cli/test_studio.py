"""`danceopd ui` without its page: student, teachers and base on one pipeline draw what each of them draws alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import random_image
from tiny_merge import run, tiny_recipe
from typer.testing import CliRunner

from danceopd.cli.app import app
from danceopd.cli.ui.studio import Studio
from danceopd.errors import UserError
from danceopd.sample import sample

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def student(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio") / "student"
    run(tiny_recipe(models, folder, steps=1))
    return folder


@pytest.fixture(scope="module")
def studio(student: Path) -> Studio:
    return Studio(student)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_each_draws_what_it_draws_alone(studio: Studio, student: Path, models: Path, tmp_path: Path) -> None:
    assert studio.models == ["student", "generation", "editing", "blend", "base"] and studio.notes == []
    order = ["base", "student", "generation", "blend", "editing", "student"]
    found = list(studio.draw(order, PROMPT, seed=3))
    assert [name for name, _ in found] == order
    made = {name: pixels(picture) for name, picture in found}
    assert np.array_equal(made["student"], pixels(found[1][1]))  # the same before and after the others
    alone = {"student": student}
    for name, lora in (("generation", "draws"), ("editing", "edits")):  # with the student's settings
        alone[name] = tmp_path / name
        shutil.copytree(models / lora, alone[name])
        shutil.copy(student / "recipe.yaml", alone[name])
    for name, folder in alone.items():
        [path] = sample(folder, PROMPT, seed=3, output=tmp_path / "out", base=models / "base")
        assert np.array_equal(made[name], pixels(Image.open(path))), name
    assert len({one.tobytes() for one in made.values()}) == len(made)


def test_strengths_move_what_they_name(studio: Studio) -> None:
    def drawn(name: str, **strengths: float) -> np.ndarray:
        [(_, picture)] = studio.draw([name], PROMPT, strengths=strengths)
        return pixels(picture)

    base = drawn("base")
    assert np.array_equal(drawn("student", student=0.0), base)
    assert np.array_equal(drawn("blend", generation=0.0, editing=0.0), base)
    assert np.array_equal(drawn("blend", editing=0.0), drawn("generation"))
    assert not np.array_equal(drawn("student", student=0.5), drawn("student"))
    assert np.array_equal(drawn("student", editing=0.0), drawn("student"))


def test_an_edit_and_steps(studio: Studio, student: Path, tmp_path: Path) -> None:
    source = random_image(1)
    source.save(tmp_path / "source.png")
    [(_, edited)] = studio.draw(["student"], "make it red", [source], seed=1)
    [path] = sample(student, "make it red", tmp_path / "source.png", seed=1, output=tmp_path)
    assert np.array_equal(pixels(edited), pixels(Image.open(path)))
    [(_, fewer)] = studio.draw(["student"], "make it red", [source], seed=1, steps=1)
    assert not np.array_equal(pixels(fewer), pixels(edited))


@pytest.mark.parametrize(("asked", "sentence"), [
    ({"prompt": " "}, "the prompt is empty"),
    ({"models": []}, "nobody is chosen to draw"),
    ({"models": ["him"]}, "'him' cannot draw here; choose of student, generation"),
    ({"seed": -1}, "the seed is -1"),
    ({"steps": 0}, "0 steps were asked for; give 1 to 1000"),
    ({"strengths": {"student": 9.0}}, "the strength of student is 9; give at most 4"),
    ({"strengths": {"student": float("nan")}}, "the strength of student is nan"),
])  # fmt: skip
def test_what_is_refused(studio: Studio, asked: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(studio.draw(**{"models": ["student"], "prompt": PROMPT, **asked}))


def test_teachers_that_are_not_there_are_said(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("/draws", "/gone").replace(str(student.parent), str(tmp_path)))
    found = Studio(copy)
    assert found.models == ["student", "editing", "base"]
    [note] = found.notes
    assert note.startswith("teacher generation is no longer at ")
    with pytest.raises(UserError):
        Studio(tmp_path / "nothing")


def test_without_gradio_it_says_what_to_install(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["ui", str(student)])
    assert result.exit_code == 2 and "pip install 'danceopd[ui]'" in result.output
