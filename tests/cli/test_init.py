"""`danceopd init`: from files to a recipe that a merge takes; what is asked, assumed and refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import random_adapter, tiny_klein
from tiny_merge import tiny_models
from typer.testing import CliRunner

from danceopd.adapters.write import write_adapter
from danceopd.cli.app import app
from danceopd.cli.wizard import command
from danceopd.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA that draws and one that edits, by their names."""
    folder = tiny_models(tmp_path_factory.mktemp("init"))
    shutil.copytree(folder / "draws", folder / "ink-style")
    shutil.copytree(folder / "edits", folder / "kontext-relight")
    return folder


def init(tmp_path: Path, *words: object) -> tuple[int, str, Path]:
    """Exit status, what was said, the recipe."""
    recipe = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(app, ["init", *map(str, words), "-o", str(recipe)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split()), recipe


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SIDE", 128)  # tiny models have few positions, and planning 1024 pixels takes long


def test_a_recipe_is_written_and_planned(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    status, said, file = init(tmp_path, "./base", "ink-style", "kontext-relight")
    assert status == 0, said
    assert re.search("ink-style: a LoRA of rank 4, for flux2-klein[^:]*: draws", said), said
    assert re.search("kontext-relight: a LoRA of rank 4, for flux2-klein[^:]*: edits", said), said
    assert "assumed: ink-style draws" in said and "Teachers" in said and "pictures are drawn first" in said
    text = file.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert (tmp_path / "recipe.schema.json").is_file() and text.count("#") > 8
    assert "(docs/data.md)\ndata: auto\n" in text  # a long comment stands above its key
    recipe = Recipe.from_yaml(file)
    found = [(t.name, t.capability) for t in recipe.teachers]
    assert found == [("ink-style", "generation"), ("kontext-relight", "editing")]
    assert recipe.data.generation == recipe.data.editing == "auto" and recipe.student.rank == 64
    status, said, _ = init(tmp_path, "./base", "ink-style", "kontext-relight")
    assert status == 2 and "is there already; --force replaces it" in said
    assert file.read_text() == text


def test_what_is_not_known_is_asked_for_on_a_terminal(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"Base model: a folder, or owner/name on the hub": str(place / "base")}
    monkeypatch.setattr(command.typer, "prompt", lambda text, default=None: asked.get(text, "e"))
    files = [str(place / "draws"), str(place / "edits")]
    base, teachers = command._sorted_out(None, files, None, None, asks=True)
    assert base == str(place / "base") and [one.capability for one in teachers] == ["editing", "editing"]
    base, teachers = command._sorted_out(base, files[:1], None, files[1], asks=True)
    assert [one.capability for one in teachers] == ["editing", "editing"] and teachers[0].path == files[1]


def test_a_lone_file_has_the_base_beside_it(place: Path, tmp_path: Path) -> None:
    status, said, file = init(tmp_path, place / "base", "--editing", place / "edits", "--gpu", "24GB")
    assert status == 0 and "the base itself is the second teacher" in said, said
    teachers = yaml.safe_load(file.read_text())["teachers"]
    assert [(t["name"], t["adapter"] == "base", t["capability"]) for t in teachers] == [
        ("edits", False, "editing"), ("plain", True, "generation"),
    ]  # fmt: skip
    assert "for a card of 24 GB, 24.0 GB" in file.read_text()


def test_a_card_that_is_too_small_changes_the_recipe(place: Path, tmp_path: Path) -> None:
    files = (place / "base", place / "ink-style", "--editing", place / "edits")
    status, said, file = init(tmp_path, *files, "--gpu", "3GB")  # in fp32, decoding a picture alone takes that
    assert status == 0 and "for a card of 3 GB: dtype bf16" in said, said
    assert Recipe.from_yaml(file).dtype == "bf16"
    status, said, file = init(tmp_path, *files, "--gpu", "0.9GB", "--force")
    assert status == 2 and "is written, and a merge would refuse it: the merge needs about" in said, said


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "there is no file to merge"),
        (["base"], "there is no file to merge"),
        (["draws", "edits"], "none of the files says which base it was trained on; give --base"),
        (["nothing.safetensors"], "nothing.safetensors does not exist"),
        (["draws", "other", "--base", "./base"], "was made for another size of Flux2Transformer2DModel"),
        (["draws", "--gpu", "abc", "--base", "./base"], "--gpu is 'abc'"),
    ],
)
def test_refusals(
    words: list[str], wanted: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    if "other" in words:
        write_adapter(random_adapter(tiny_klein(num_attention_heads=4).transformer), place / "other")
    status, said, file = init(tmp_path, *words)
    assert status == 2 and wanted in said and "Traceback" not in said, said
    assert not file.exists()
