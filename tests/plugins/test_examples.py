"""The example package, installed: each kind of plug-in at work on the tiny model, recorded, and listed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_merge import WEIGHTS, json_lines, run, tiny_recipe
from typer.testing import CliRunner

from danceopd.adapters.header import inspect_adapter
from danceopd.bench.options import BlendOptions, JudgeOptions, SuiteOptions
from danceopd.bench.run import bench
from danceopd.cli.app import app
from danceopd.cli.plugins.listing import describe
from danceopd.pipelines.registry import FAMILIES
from danceopd.plan import plan
from danceopd.plugins import KINDS
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.reference import schema

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"
NAMES = {
    "family": "klein-attention", "objective": "huber", "reward": "contrast", "query law": "triangle",
    "teacher field": "bounded", "blend method": "median", "suite": "colours", "judge": "brightness", "metric": "warmth",
    "callback": "notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the examples are installed in, on the path while the tests of this file run."""
    folder = tmp_path_factory.mktemp("examples")
    source = shutil.copytree(EXAMPLES, folder / "source")  # so that building leaves nothing in the repository
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pip += ["--no-build-isolation", "--no-index", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder / "site")])
        yield folder / "site"
    FAMILIES.pop(NAMES["family"], None)
    for name in [name for name in sys.modules if name.startswith("danceopd_examples")]:
        del sys.modules[name]


def own_recipe(models: Path, output: Path, **fields: Any) -> Recipe:
    """Every kind that a merge has, but a reward."""
    teachers = [
        {"name": "draws", "adapter": str(models / "draws"), "capability": "generation",
         "field": "bounded", "field_options": {"most": 0.5}},
        {"name": "edits", "adapter": str(models / "edits"), "capability": "editing"},
    ]  # fmt: skip
    given = {
        "teachers": teachers, "family": "klein-attention", "objective": "huber", "objective_options": {"delta": 0.5},
        "query": {"law": "triangle", "law_options": {"peak": 0.3}}, "student": {"rank": 8, "init_method": "median"},
        "callbacks": {"notes": {"file": str(output.parent / "notes.txt"), "every": 2}},
    }  # fmt: skip
    return Recipe(**{**tiny_recipe(models, output).resolved(), **given, **fields})


@pytest.fixture(scope="module")
def student(installed: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge with a plug-in of each kind, which was stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("merge") / "student"
    run(own_recipe(models, folder), kill=2)
    assert run(own_recipe(models, folder)) == [3, 4]
    return folder


def test_a_merge_uses_and_records_them(student: Path) -> None:
    assert len((student.parent / "notes.txt").read_text().splitlines()) == 2
    losses = [line for line in json_lines(student / "metrics.jsonl") if "lowest_loss" in line]
    lowest = [line["lowest_loss"] for line in losses]
    assert len(lowest) == 4 and lowest == sorted(lowest, reverse=True)  # kept over the interruption
    assert lowest[-1] == min(line["loss"] for line in losses)
    record = json.loads((student / "plugins.json").read_text())
    named = [f"{kind} {NAMES[kind]}" for kind in KINDS if kind not in ("reward", "suite", "judge", "metric")]
    assert sorted(record) == sorted(named) and all(len(places) == 1 for places in record.values())
    assert all(place.startswith("danceopd-examples 1.0, sha256 ") for [place] in record.values())
    recipe, card = (student / "recipe.yaml").read_text(), (student / "README.md").read_text()
    assert recipe.startswith("# ") and "# objective huber: danceopd-examples 1.0, sha256" in recipe
    assert "- Plug-in: query law triangle: danceopd-examples 1.0" in card and "- The lowest loss of a step was" in card
    assert Recipe.from_yaml(student / "recipe.yaml").objective_options == {"delta": 0.5}
    assert "The student started as the median blend" in card


def test_a_plan_says_what_it_does_not_know(student: Path, models: Path, tmp_path: Path) -> None:
    notes = "\n".join(plan(own_recipe(models, tmp_path / "x"), tflops=1.0)["notes"])
    assert "objective huber: danceopd-examples 1.0, sha256" in notes and "; planned as danceopd" in notes
    assert "teacher field bounded:" in notes and "what it takes itself is not planned" in notes


def test_a_run_that_goes_on_with_another_version_says_so(student: Path, models: Path, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    record = json.loads((folder / "plugins.json").read_text())
    (folder / "plugins.json").write_text(json.dumps(record | {"objective huber": ["danceopd-examples 0.9"]}))
    callbacks = {"notes": {"file": str(tmp_path / "other.txt"), "every": 1}}  # which may change
    assert run(own_recipe(models, folder, steps=5, callbacks=callbacks)) == [5]
    assert "objective huber is danceopd-examples 1.0, sha256" in caplog.text
    assert "and was danceopd-examples 0.9 before; the run goes on with it" in caplog.text
    assert "Plug-in: objective huber: danceopd-examples 0.9, then danceopd-examples 1.0" in (
        folder / "README.md"
    ).read_text()


def test_a_reward_ranks_the_students_samples(installed: Path, models: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        models, tmp_path / "x", objective="nft", steps=1, save_every=1, monitor={"every": 0}, validation={"every": 0},
        nft={"group": 2, "round": 1, "reuse": 1, "rewards": {"contrast": {"weight": 2, "options": {"power": 2.0}}}},
    )  # fmt: skip
    assert run(recipe) == [1]
    assert json.loads((tmp_path / "x" / "plugins.json").read_text())["reward contrast"]


def test_a_bench_with_a_suite_a_metric_and_a_blend_method(student: Path, tmp_path: Path) -> None:
    from danceopd_examples.metric import warmth
    from danceopd_examples.suite import Colours

    names: dict[str, Any] = {"suite": "colours", "metrics": ["warmth"], "blends": BlendOptions(methods=["median"])}
    found = bench(student, against=["blend", "draws"], output=tmp_path / "names", batch=4, **names)
    assert found.scores["suite"]["name"] == "colours"
    assert sorted(found.scores["plugins"]) == ["blend method median", "family klein-attention", "metric warmth",
                                               "suite colours"]  # fmt: skip
    assert set(found.scores["metrics"]["generation"]["student"]) == {"warmth"}
    assert {row["model"] for row in found.rows} == {"median", "draws", "student"}
    assert "warmth" in found.report.read_text()
    given = bench(student, Colours(), ["none"], tmp_path / "objects", metrics=[warmth], limit=1, batch=4)
    by = {row["key"]: row for row in found.rows if row["model"] == "student"}
    assert [row["metrics"] for row in given.rows] == [by["red"]["metrics"]]
    assert given.rows[0]["score"] == by["red"]["score"]


def test_a_judge_scores_edits(student: Path, tmp_path: Path) -> None:
    from danceopd_examples.judge import Brightness

    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    edit = {"source": "a.png", "instruction": "make it darker", "key": "one"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(edit))
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "mine" / "one.png")
    module = f"{Brightness.__module__}:Brightness"
    judges = {"name": "brightness:1.5", "object": Brightness("1.5"), "module": f"{module}:1.5"}
    scores = []
    for name, judge in judges.items():
        found = bench(
            suite="folder", output=tmp_path / name, images={"mine": tmp_path / "mine"}, judge=JudgeOptions(judge),
            suite_options=SuiteOptions(data=tmp_path / "edits.jsonl"),
        )  # fmt: skip
        scores.append(found.rows[0]["score"])
        assert found.scores["judge"]["plugin"].partition(", sha256")[0] == {
            "name": "brightness: danceopd-examples 1.0", "object": "danceopd_examples.judge:brightness: judge.py",
            "module": f"{module}: judge.py",
        }[name]  # fmt: skip
    assert scores[0] == pytest.approx(7.5, abs=0.1) and len(set(scores)) == 1


def test_a_blend_says_by_which_method(installed: Path, models: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["blend", str(models / "draws"), str(models / "edits"), "--method", "median", "-o",
                                    str(tmp_path / "out")])  # fmt: skip
    assert done.exit_code == 0, done.output
    record = inspect_adapter(tmp_path / "out" / WEIGHTS).record
    assert record["method"].startswith("median (danceopd-examples 1.0, sha256")
    assert record["blend"].startswith("median: ")


def test_they_are_listed(installed: Path) -> None:
    found = describe()
    assert {kind: [row["name"] for row in facts["plugins"]] for kind, facts in found.items()} == {
        kind: [name] for kind, name in NAMES.items()
    }
    rows = [row for facts in found.values() for row in facts["plugins"]]
    assert all(row["fault"] is None and row["from"].startswith("danceopd-examples 1.0") for row in rows)
    shown = CliRunner().invoke(app, ["plugins"], terminal_width=200).output
    assert all(name in shown for name in NAMES.values()) and "none is built in" in shown
    listed = CliRunner().invoke(app, ["suites"], terminal_width=200).output
    assert "colours" in listed
    assert {"enum": ["huber"]} in schema(installed=True)["properties"]["objective"]["anyOf"]
    assert {"enum": ["huber"]} not in schema()["properties"]["objective"]["anyOf"]
