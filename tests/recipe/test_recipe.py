"""A recipe that exists is valid; one that is not is refused in one sentence that names key, place and cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from danceopd.common.shipped import SHIPPED, portable, resolve, shipped
from danceopd.errors import UserError
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe


def teacher(name: str, adapter: str = "models/edits", capability: str = "editing", **more: object) -> dict:
    return {"name": name, "adapter": adapter, "capability": capability, **more}


def test_shorthand_is_two_teachers_with_absolute_paths(files: dict) -> None:
    recipe = Recipe(**files)
    assert [(t.name, t.capability) for t in recipe.teachers] == [("generation",) * 2, ("editing",) * 2]
    assert recipe.teachers[1].adapter == str(Path("models/edits").absolute())
    assert recipe.base == str(Path("models/base").absolute())
    assert recipe.shares() == {"generation": 0.5, "editing": 0.5}


def test_the_bare_base_is_a_teacher(files: dict) -> None:
    assert Recipe(**files | {"generation": "base"}).teachers[0].adapter == "base"


def test_shares_follow_weights_and_routing_weights_win(files: dict) -> None:
    teachers = [teacher("a", weight=3), teacher("b"), teacher("c")]
    recipe = Recipe(base=files["base"], teachers=teachers, routing={"weights": {"c": 4}})
    assert recipe.shares() == {"a": 0.375, "b": 0.125, "c": 0.5}


def test_frozen(files: dict) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(**files).steps = 5  # type: ignore[misc]


def test_yaml_round_trip_from_another_folder(files: dict, tmp_path: Path, monkeypatch) -> None:
    recipe = Recipe(**files, student={"init": "models/draws"}, query={"law": "uniform", "beta": [2, 3]})
    Path("resolved.yaml").write_text(recipe.to_yaml())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = Recipe.from_yaml("../resolved.yaml")
    assert again.resolved() == recipe.resolved()
    assert again.student.init == str(tmp_path / "models/draws")


def test_flags_win_over_the_file(files: dict) -> None:
    Path("r.yaml").write_text(yaml.safe_dump({**files, "steps": 7, "seed": 3}))
    recipe = Recipe.load("r.yaml", steps=9, seed=None, editing="base")
    assert (recipe.steps, recipe.seed, recipe.teachers[1].adapter) == (9, 3, "base")


def test_a_teacher_flag_replaces_the_teacher_of_its_capability(files: dict) -> None:
    teachers = [teacher("draws", capability="generation"), teacher("local"), teacher("global")]
    Path("r.yaml").write_text(yaml.safe_dump({"base": files["base"], "teachers": teachers}))
    assert Recipe.load("r.yaml", generation="base").teachers[0] == Teacher(
        name="draws", adapter="base", capability="generation"
    )
    with pytest.raises(UserError, match="--editing is ambiguous.*2 editing teachers"):
        Recipe.load("r.yaml", editing="base")


def test_scientific_notation_without_a_dot_is_a_number(files: dict) -> None:
    Path("r.yaml").write_text(yaml.safe_dump(files) + "optimizer:\n  lr: 1e-3\n")
    assert Recipe.from_yaml("r.yaml").optimizer.lr == 1e-3


def test_identity_ignores_what_a_continuation_may_change(files: dict) -> None:
    one = Recipe(**files)
    assert one.identity() == Recipe(**files, steps=9, output="x", time_limit=1, save_every=3).identity()
    assert one.identity() != Recipe(**files, seed=1).identity()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps is 0 in the recipe; it must be greater than 0"),
        ({"steps": -1}, "steps is -1 in the recipe; it must be greater than 0"),
        ({"steps": "many"}, "steps is 'many' in the recipe; it must be a whole number"),
        ({"steps": True}, "steps is the boolean true"),
        ({"stepz": 3}, "unknown key 'stepz' in the recipe; did you mean 'steps'"),
        ({"optimizer": {"lrr": 1}}, "unknown key 'optimizer.lrr' in the recipe; did you mean 'lr'"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1 in the recipe; it must be greater than 0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan in the recipe; it must be a finite number"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1 is 1.5 in the recipe; it must be less than 1"),
        ({"optimizer": 3}, "optimizer is 3 in the recipe; it must be a mapping"),
        ({"query": {"law": "lo-noise"}}, "query.law is 'lo-noise' in the recipe; did you mean 'low-noise'"),
        ({"query": {"law": False}}, "query.law is the boolean false in the recipe .YAML reads a bare no"),
        ({"call": {"hight": 64}}, "unknown key call.hight; did you mean 'height'"),
        ({"student": {"init": "blnd"}}, "student.init 'blnd' does not exist .*; did you mean 'blend'"),
        ({"student": {"init_weights": {"edit": 1}}}, "student.init_weights names 'edit'.*did you mean 'editing'"),
        ({"routing": {"weights": {"x": 1}}}, "routing.weights names 'x', which is no teacher"),
        ({"editing": "models/none"}, "teachers.1.adapter: adapter 'models/none' does not exist"),
        ({"editing": "editng"}, "teachers.1.adapter: adapter 'editng' does not exist .*did you mean 'editing'"),
        ({"base": "./none"}, "base: base model './none' does not exist"),
        ({"generation": "base", "editing": "base"}, "every teacher is the bare base"),
        ({"teachers": []}, "`teachers` and `generation` both name teachers"),
        ({"device": "gpu"}, "device is 'gpu' in the recipe"),
        ({"seed": -1}, "seed is -1 in the recipe"),
    ],
)
def test_refused_in_a_sentence(files: dict, change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Recipe(**{**files, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ([teacher("x"), teacher("x")], "two teachers are named 'x'"),
        ([teacher("x")], "at least two teachers and here is 1"),
        ([teacher("x"), teacher("y", wieght=2)], "unknown key 'teachers.1.wieght' .*did you mean 'weight'"),
        ([teacher("x"), {"name": "y"}], "teachers.1.capability is missing"),
        ([teacher("x"), teacher("y", capability="edit")], "teachers.1.capability is 'edit'.*'editing'"),
        ([teacher("x"), teacher("student")], "may not be named 'student'"),
        ([teacher("a b"), teacher("y")], "teachers.0.name is 'a b'.*letters, digits"),
        ([teacher("x"), teacher("y", weight=0)], "teachers.1.weight is 0"),
        ([teacher("x"), 3], "teachers.1 is 3 .*mapping"),
        ("x", "teachers is 'x' in the recipe; it must be a list"),
    ],
)
def test_teachers_refused(files: dict, teachers: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe(base=files["base"], teachers=teachers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [1\n", "r.yaml, line 2 is not valid YAML"),
        ("steps: 1\nsteps: 2\n", "r.yaml, line 2 is not valid YAML: the key 'steps' is there twice"),
        ("- 1\n", "r.yaml holds .1., ?|it must be a mapping"),
        ("1: 2\n", "has the key 1, which is not a word"),
        ("query: {lw: uniform}\n", "unknown key 'query.lw' in r.yaml; did you mean 'law'"),
        ("device: off\n", "device is the boolean false in r.yaml"),
        ("steps: !!python/object/apply:os.getcwd []\n", "r.yaml, line 1 is not valid YAML"),
    ],
)
def test_yaml_faults_name_the_file(files: dict, text: str, words: str) -> None:
    Path("r.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        Recipe.load("r.yaml", **files)


def test_missing_recipe_folder_and_bytes(files: dict) -> None:
    with pytest.raises(UserError, match="none.yaml does not exist"):
        Recipe.from_yaml("none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        Recipe.from_yaml("models")
    Path("r.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(UserError, match="not text in UTF-8"):
        Recipe.from_yaml("r.yaml")


def test_output_that_is_a_file(files: dict) -> None:
    Path("out").write_text("")
    with pytest.raises(UserError, match="output out is a file"):
        Recipe(**files, output="out")


def test_hub_names_pass_for_bases_only() -> None:
    assert resolve("owner/model-4B", "base model", hub=True) == "owner/model-4B"
    with pytest.raises(UserError, match="does not exist"):
        resolve("owner/lora", "adapter")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoints_are_found_and_written_by_name(name: str) -> None:
    path = shipped(name)
    assert path.is_dir()
    assert resolve(name, "adapter") == str(path)
    assert portable(str(path)) == name


def test_a_shipped_name_that_is_none() -> None:
    with pytest.raises(UserError, match="did you mean 'local-edit'"):
        shipped("local-edits")


def test_the_default_recipe_is_whole() -> None:
    recipe = Recipe.load()
    assert [t.name for t in recipe.teachers] == ["generation", "editing"]
    assert yaml.safe_load(recipe.to_yaml())["base"] == "base"
