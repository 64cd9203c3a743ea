"""Recipes of earlier versions: renamed keys work and are named once, removed ones are dropped or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_merge import WEIGHTS, json_lines, run, tiny_recipe

from danceopd.errors import UserError
from danceopd.labelfree.monitor import OLD_KEYS
from danceopd.recipe.aliases import REMOVED, RENAMED, modernise
from danceopd.recipe.recipe import Recipe, _warn
from danceopd.run.directory import OLD_NAMES, RunDirectory

VALUES = {
    "gap": {"every": 7, "patience": 2},
    "watch": {"every": 9, "prompts": 8},
    "call.steps": 5,
    "rollout.keep_source": True,
    "rollout.captured": True,
}
"""A value of each renamed key."""
OTHER = {
    "rollout.persistent": 4,
    "routing.answer": "mean",
    "gates.experiment": True,
    "gates.consensus.target": "live-self",
    "gates.consensus.by": "strength",
    "gates.consensus.jitter": 0.3,
    "gates.consensus.outputs": "walk",
    "gates.consensus.rank": 0.2,
    "gates.consensus.edited": 0.5,
    "gates.consensus.kept": 0.6,
}
"""A value of each removed key that is not its default."""


@pytest.fixture(autouse=True)
def unwarned() -> None:
    """As in a fresh process."""
    _warn.cache_clear()


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping in which a dotted key has a value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_name_works_and_one_line_says_so(files: dict, caplog, key: str) -> None:
    new = RENAMED[key]
    with caplog.at_level(logging.WARNING):
        found = Recipe(**files, **nested(key, VALUES[key]))
    said = [record.message for record in caplog.records]
    assert said == [f"recipe key {key} is now called {new}; the old name works for one version"]
    caplog.clear()
    assert Recipe(**files, **nested(key, VALUES[key])) == found and not caplog.records  # once a process
    assert found == Recipe(**files, **nested(new, VALUES[key])) and not caplog.records
    assert found != Recipe(**files)
    text = found.to_yaml()
    assert Recipe.load(None, **yaml.safe_load(text)) == found and not caplog.records  # it is written by the new name
    with pytest.raises(UserError, match=f"{key} is the old name of {new}, and both are given; keep {new}"):
        Recipe(**files, **merged(nested(key, VALUES[key]), nested(new, VALUES[key])))


def merged(one: dict, other: dict) -> dict:
    """Two mappings of mappings as one."""
    both = one | other
    for key in one.keys() & other.keys():
        both[key] = {**one[key], **other[key]}
    return both


def test_the_old_names_of_a_file_are_read(files: dict, caplog) -> None:
    Path("r.yaml").write_text(yaml.safe_dump({**files, "gap": {"every": 5}, "call": {"steps": 3, "height": 64}}))
    recipe = Recipe.load("r.yaml", steps=9)
    assert recipe.validation.every == 5 and recipe.call == {"num_inference_steps": 3, "height": 64}
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="unknown key 'validation.evry' in the recipe; did you mean 'every'"):
        Recipe(**files, gap={"evry": 5})


def test_every_removed_key_has_another_value_here() -> None:
    assert OTHER.keys() == REMOVED.keys() and VALUES.keys() == RENAMED.keys()
    assert all(OTHER[key] != default for key, (default, _) in REMOVED.items())


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_dropped_at_its_old_default_and_else_refused(files: dict, caplog, key: str) -> None:
    default, why = REMOVED[key]
    assert Recipe(**files, **nested(key, default)).resolved() == Recipe(**files, **empty(key)).resolved()
    assert not caplog.records
    with pytest.raises(UserError) as refused:
        Recipe(**files, **nested(key, OTHER[key]))
    assert f"{key} was removed: {why}; leave it out" in str(refused.value) and "\n" not in str(refused.value)


def empty(key: str) -> dict[str, Any]:
    """What is left of the mapping in which a dotted key was all."""
    return nested(key.rpartition(".")[0], {})


def test_rows_that_would_have_been_ranked_are_refused(files: dict) -> None:
    """Ranks were on by default where rows came in groups, so a run that had them cannot be the same run."""
    gates = {"evidence": True, "consensus": {"rank": 0.5}}
    assert Recipe(**files, gates={**gates, "group": 1}).gates.consensus is not None
    with pytest.raises(UserError, match="gates.consensus.rank was removed.*leave out gates.group"):
        Recipe(**files, gates={**gates, "group": 2})


@pytest.mark.parametrize("consensus", [True, {"bound": 0.2}])
def test_rows_that_were_ranked_by_default_are_told(files: dict, caplog, consensus: Any) -> None:
    with caplog.at_level(logging.WARNING):
        Recipe(**files, gates={"evidence": True, "consensus": consensus, "group": 2})
        Recipe(**files, gates={"evidence": True, "group": 2})
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("gates.consensus no longer ranks the pictures of a group")


def test_modernising_changes_no_mapping_that_it_was_given() -> None:
    data = {"gap": {"every": 5}, "rollout": {"persistent": 1, "captured": True}}
    found, warnings = modernise(data)
    assert data == {"gap": {"every": 5}, "rollout": {"persistent": 1, "captured": True}}
    assert found == {"validation": {"every": 5}, "rollout": {"cuda_graphs": True}}
    assert [line.split()[2] for line in warnings] == ["gap", "rollout.captured"]


# Run folders of earlier versions


FIELDS = {
    "validation": {"every": 2, "rows": 2},
    "monitor": {"every": 2, "prompts": 8, "seeds": 2},
    "gates": {"consensus": True},
}

SETTLED = {"dtype": "fp32", "micro_batch": None, "gradient_checkpointing": False, "rollout.merged": True}
"""What a run on a CPU keeps of settings that are `auto`: what earlier versions had as defaults."""


def make_old(folder: Path) -> None:
    """Give a run's folder the keys and the files' names that earlier versions wrote, all keys at their defaults."""
    data = yaml.safe_load((folder / "recipe.yaml").read_text())
    for key, new in RENAMED.items():
        parts, name = key.split(".")[:-1], key.split(".")[-1]
        here = data
        for part in parts:
            here = here[part]
        here[name] = here.pop(new.rpartition(".")[2])
    for key, (default, _) in REMOVED.items():
        here = data
        for part in key.split(".")[:-1]:
            here = here[part]
        here[key.split(".")[-1]] = default
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    for old, new in OLD_NAMES.items():
        (folder / old).unlink(missing_ok=True)
        (folder / new).rename(folder / old)
    for name, keys in (("gap.json", {"gap": "error"}), ("watch.json", OLD_KEYS), ("watch.jsonl", OLD_KEYS)):
        text = (folder / name).read_text()
        for old, new in keys.items():
            assert f'"{new}":' in text
            text = text.replace(f'"{new}":', f'"{old}":')
        (folder / name).write_text(text)


def test_an_old_run_is_continued_to_the_same_student(models: Path, tmp_path: Path, caplog) -> None:
    whole, old = tmp_path / "whole", tmp_path / "old"
    run(tiny_recipe(models, whole, **FIELDS))
    run(tiny_recipe(models, old, **FIELDS), kill=3)
    make_old(old)
    before = json.loads((old / "gap.json").read_text())
    assert [check["step"] for check in before["checks"]] == [0, 2] and not (old / "validation.json").exists()
    assert run(tiny_recipe(models, old, **FIELDS)) == [3, 4]
    assert (old / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (old / "recipe.yaml").read_text() == tiny_recipe(models, old, **FIELDS).replaced(SETTLED).to_yaml()
    found = json.loads((old / "validation.json").read_text())
    assert [check["step"] for check in found["checks"]] == [0, 2, 4]
    for check, same in zip(found["checks"], before["checks"]):
        assert check["error"] == same["gap"] and check["teachers"].keys() == same["teachers"].keys()
    for line, same in zip(json_lines(old / "monitor.jsonl"), json_lines(whole / "monitor.jsonl"), strict=True):
        assert {**line, "seconds": 0} == {**same, "seconds": 0}
    assert not [name for name in ("watch.json", "watch.jsonl", "gap.png") if (old / name).exists()]
    renamed = [record.message for record in caplog.records if "is now called" in record.message]
    assert len(renamed) == len(RENAMED)  # though the folder's recipe is read more than once
    assert (old / "gap.json").samefile(old / "validation.json")  # the old name, for one version


def test_an_old_recipe_continues_a_new_run_and_another_value_does_not(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny_recipe(models, folder, **FIELDS), kill=3)
    make_old(folder)
    old = Recipe.from_yaml(folder / "recipe.yaml")
    assert old.resolved() == tiny_recipe(models, folder, **FIELDS).replaced(SETTLED).resolved()
    RunDirectory(folder, old).close()
    with pytest.raises(UserError, match=r"holds another run \(call.num_inference_steps is 3 there and 4 here\)"):
        RunDirectory(folder, old.model_copy(update={"call": {**old.call, "num_inference_steps": 4}}))
