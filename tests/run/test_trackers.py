"""Trackers get what the log gets, go on in the same run, end no merge when they fail, and are refused early."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import stub_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_merge import json_lines, run, tiny_recipe

from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.values.trackers import TRACKERS
from danceopd.run.directory import RunDirectory
from danceopd.run.trackers.tracker import KINDS, check_trackers

BOTH = {"wandb": {"project": "loras", "tags": ["klein"]}, "mlflow": {"name": "first"}, "tensorboard": {}}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stub_trackers.Calls]:
    with stub_trackers.installed(tmp_path / "trackers", monkeypatch) as found:
        yield found


def test_a_merge_is_tracked_and_goes_on_in_the_same_run(models: Path, tmp_path: Path, calls) -> None:
    def recipe(**fields: object) -> Recipe:
        fields = {"rollout": {"steps": 2}, **fields}
        return tiny_recipe(models, tmp_path / "out", trackers=BOTH, **fields)

    assert run(recipe(), kill=3) == [1, 2, 3]
    assert run(recipe(steps=4)) == [3, 4]
    first, second = calls.of("wandb.init")
    assert first["project"] == "loras" and first["tags"] == ["klein"] and first["name"] == "out"
    assert (first["id"], second["id"], second["resume"]) == (None, "w1", "allow")
    assert [one["id"] for one in calls.of("mlflow.start")] == [None, "m1"]
    assert len(calls.of("mlflow.params")) == 2  # of a hundred each, of the first start alone
    assert len(calls.of("wandb.finish")) == len(calls.of("mlflow.end")) == 2
    [config] = calls.of("wandb.config")
    assert config["values"]["optimizer.lr"] == 2e-4 and config["values"]["teachers.0.adapter"] == "draws"
    assert str(models) not in json.dumps(config) and not [key for key in config["values"] if "trackers" in key]
    lines = json_lines(tmp_path / "out" / "metrics.jsonl")
    told = [one["values"] for one in calls.of("wandb.log")]
    figures = {one["step"]: one for one in told if "samples" not in one}  # of a step told twice, the last
    numbers = [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in lines]
    assert [figures[line["step"]] for line in numbers] == numbers
    assert [one["step"] for one in told if "samples" in one] == [0, 4]
    assert all(one["step"] is None for one in calls.of("wandb.log"))  # over its own, which may fall
    assert {"call": "wandb.define", "name": "*", "over": "step"} in calls.of("wandb.define")
    assert [one["step"] for one in calls.of("mlflow.log")] == [0, 1, 2, 3, 3, 4]
    assert [one["file"] for one in calls.of("mlflow.artifact")] == ["step-000000.png", "step-000004.png"]
    events = EventAccumulator(str(tmp_path / "out" / "logs")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert "loras" not in (tmp_path / "out" / "README.md").read_text()


def test_a_server_that_fails_later_ends_its_tracker_alone(files, calls, monkeypatch, caplog) -> None:
    with RunDirectory("out", Recipe(**files, output="out", trackers="wandb,mlflow")) as folder:
        folder.logger.start()
        monkeypatch.setenv("STUB_FAIL", "wandb.log mlflow.end")
        with caplog.at_level(logging.WARNING, "danceopd"):
            for step in (1, 2):
                folder.logger.log(step, loss=0.5)
                folder.logger.image(step, Image.new("RGB", (8, 8)))
    assert len(calls.of("mlflow.log")) == 2 and not calls.of("wandb.log") and not os.path.exists("out/logs")
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first == ("tracker wandb fails (wandb.log: no such host); the run goes on without it, and metrics.jsonl has "
                     "all figures")  # fmt: skip
    assert second == "tracker mlflow does not close (mlflow.end: no such host)"


def test_a_rollback_and_a_second_opening(files, calls) -> None:
    """TensorBoard counts what came after the step no more; the others go on in their run."""
    with RunDirectory("out", Recipe(**files, output="out", trackers=[*TRACKERS])) as folder:
        for step in (1, 2, 3):
            folder.logger.log(step, loss=float(step))
        folder.logger.forget(1)
        folder.logger.log(2, loss=20.0)
    events = EventAccumulator("out/logs").Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert [one["values"]["step"] for one in calls.of("wandb.log")] == [1, 2, 3, 2] and len(calls.of("wandb.init")) == 1


@pytest.mark.parametrize("known", [False, True])
def test_a_server_that_does_not_answer_is_said_before_a_model_is_loaded(files, calls, monkeypatch, known) -> None:
    monkeypatch.setenv("STUB_FAIL", "wandb.init")
    with RunDirectory("out", Recipe(**files, output="out", trackers="wandb")) as folder:
        if known:
            Path("out/trackers.json").write_text('{"wandb": "w7"}')
        with pytest.raises(UserError) as caught:
            folder.logger.start()
    again = ", delete out/trackers.json to begin another run there" if known else ""
    assert str(caught.value) == (
        f"tracker wandb does not start (wandb.init: no such host); mend that{again}, or leave it out of trackers"
    )


def test_a_tracker_that_is_not_installed(models: Path, tmp_path: Path, monkeypatch) -> None:
    """Nor is a folder of its name, such as wandb makes where it runs."""
    (tmp_path / "here" / "wandb").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "here")
    with pytest.raises(UserError, match="tracker wandb is not installed; pip install wandb, or leave it out"):
        run(tiny_recipe(models, tmp_path / "out", trackers="wandb"))
    assert not (tmp_path / "out" / "README.md").exists()
    with pytest.raises(UserError, match="mlflow is not installed"):
        check_trackers({"mlflow": {}})


def test_what_a_recipe_says_of_trackers(files) -> None:
    def trackers(value: object) -> dict:
        return Recipe(**files, trackers=value).trackers

    assert tuple(KINDS) == TRACKERS and Recipe(**files).trackers == {"tensorboard": {}}
    assert trackers("wandb, mlflow") == trackers(["wandb", "mlflow"]) == {"wandb": {}, "mlflow": {}}
    assert trackers("none") == trackers(None) == trackers([]) == trackers({}) == {}
    assert trackers({"wandb": None, "tensorboard": {"max_queue": 5}}) == {"wandb": {}, "tensorboard": {"max_queue": 5}}
    for value, sentence in {
        "wandbb": "trackers: no tracker is named 'wandbb'; did you mean 'wandb'?",
        "all": "no tracker is named 'all'; known: tensorboard, wandb, mlflow, none",
        "none,wandb": "no tracker is named 'none'",
        "wandb,wandb": "trackers: wandb is named twice",
        7: "no tracker is named 7",
        True: "trackers is the boolean true",
    }.items():
        with pytest.raises(UserError, match=sentence):
            trackers(value)
    with pytest.raises(UserError, match="trackers: wandb has 'loras'; give a mapping of its options"):
        trackers({"wandb": "loras"})
