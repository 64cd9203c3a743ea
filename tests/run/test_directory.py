"""The run folder: whole checkpoints or none, the same run continued exactly, other runs left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import program
import pytest
import torch
from PIL import Image

from danceopd.common.distributed import Processes
from danceopd.common.rng import RandomState
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.run.checkpoints import Checkpoints
from danceopd.run.directory import RunDirectory, check_directory


@pytest.fixture
def recipe(files: dict) -> Recipe:
    return Recipe(**files, output="out", steps=10)


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    a = torch.full((4, 3), value)
    return {"lora.a": a, "adam.m": a.T, "ema.a": a, "step": torch.tensor(3)}


def lines(folder: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def restore(folder: RunDirectory) -> dict | None:
    """Continue the run, as a merge does, with a trainer that only listens; the checkpoint's facts, if there is one."""
    trainer = SimpleNamespace(load_state_dict=lambda step, state: None)
    return Checkpoints(folder, Processes("cpu"), 1, [], {}).restore(trainer)


def test_a_new_folder_holds_the_resolved_recipe(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        there = Recipe.from_yaml("out/recipe.yaml").resolved()
        assert there == {**recipe.resolved(), "output": str(Path("out").absolute())}  # from which a move is told
        assert folder.checkpoints.load() is None and folder.checkpoints.latest() is None and not folder.finished


def test_save_and_load_give_back_bytes_meta_and_every_random_generator(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        torch.manual_seed(1), np.random.seed(2), random.seed(3)
        random.gauss(0, 1), np.random.standard_normal()
        folder.checkpoints.save(3, state(), {"loss": 0.5})
        drawn = torch.rand(2), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()
    with RunDirectory("out", recipe) as folder:
        step, tensors, meta, states = folder.checkpoints.load()  # type: ignore[misc]
        assert (step, meta) == (3, {"loss": 0.5})
        states[0].restore()
        assert tensors.keys() == state().keys()
        assert all(torch.equal(tensors[key], value) for key, value in state().items())
        assert torch.equal(torch.rand(2), drawn[0])
        assert (np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()) == drawn[1:]


def test_only_the_last_checkpoints_stay(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        for step in (1, 2, 30):
            folder.checkpoints.save(step, state(), {})
        assert sorted(os.listdir("out/checkpoints")) == ["step-000002", "step-000030"]
    with RunDirectory("out", recipe.model_copy(update={"keep_last": 1})) as folder:
        folder.checkpoints.save(31, state(), {})
        assert os.listdir("out/checkpoints") == ["step-000031"]


def test_every_process_gets_its_own_random_state_back(recipe: Recipe) -> None:
    states = []
    for seed in range(3):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        states.append(RandomState.now())
    drawn = torch.rand(2), np.random.standard_normal(3).tolist(), random.random()
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(3, state(), {}, states)
        saved = folder.checkpoints.load()
        assert saved is not None and saved.tensors.keys() == state().keys() and len(saved.random) == 3
        for one, found in zip(states, saved.random):
            assert one.plain == found.plain and one.tensors.keys() == found.tensors.keys()
            assert all(torch.equal(value, found.tensors[key]) for key, value in one.tensors.items())
        saved.random[2].restore()
    assert torch.equal(torch.rand(2), drawn[0])
    assert (np.random.standard_normal(3).tolist(), random.random()) == drawn[1:]


def test_a_checkpoint_of_before_there_were_manifests_is_continued(recipe: Recipe) -> None:
    """Old ones name the state's hash in meta.json, and have no other process's random state."""
    with RunDirectory("out", recipe) as folder:
        place = folder.checkpoints.save(3, state(), {"loss": 0.5})
        facts = json.loads((place / "meta.json").read_text())
        del facts["others"]
        hashes = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").unlink()
        (place / "meta.json").write_text(json.dumps(facts))
        assert folder.checkpoints.load() is None  # a manifest that is lost is not one that never was
        (place / "meta.json").write_text(json.dumps({**facts, "sha256": hashes["state.safetensors"]}))
        saved = folder.checkpoints.load()
    assert saved is not None and (saved.step, saved.meta, len(saved.random)) == (3, {"loss": 0.5}, 1)


def test_saving_a_step_again_replaces_it(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(1, state(1), {})
        folder.checkpoints.save(1, state(2), {})
        assert folder.checkpoints.load()[1]["lora.a"][0, 0] == 2  # type: ignore[index]


@pytest.mark.parametrize(
    "damage",
    ["cut", "flip", "no meta", "half meta", "other meta", "no state", "half manifest", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(recipe: Recipe, damage: str, caplog) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(1, state(), {})
        newest = folder.checkpoints.save(2, state(), {})
        file = newest / "state.safetensors"
        content = file.read_bytes()
        if damage == "cut":
            file.write_bytes(content[:-5])
        elif damage == "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "no state":
            file.unlink()
        elif damage == "no meta":
            (newest / "meta.json").unlink()
        elif damage == "other meta":
            text = (newest / "meta.json").read_text()
            (newest / "meta.json").write_text(text.replace('"step": 2', '"step": 3'))
        elif damage == "no manifest":
            (newest / "manifest.json").unlink()
        elif damage == "half manifest":
            (newest / "manifest.json").write_text('{"state')
        else:
            (newest / "meta.json").write_text('{"step"')
        assert folder.checkpoints.load()[0] == 1  # type: ignore[index]
    assert "step-000002 is damaged and is passed over" in caplog.text


def test_what_is_damaged_is_not_kept_in_place_of_what_is_whole(recipe: Recipe) -> None:
    """A later one that is damaged does not push out what is saved after it was passed over; it goes then."""
    few = recipe.model_copy(update={"keep_last": 2})
    with RunDirectory("out", few) as folder:
        for step in (20, 30, 40):
            newest = folder.checkpoints.save(step, state(), {})
        for broken in (newest, newest.with_name("step-000030")):
            (broken / "state.safetensors").write_bytes(b"cut")
        assert folder.checkpoints.load() is None
        assert len(os.listdir("out/checkpoints")) == 2  # until there is another
        folder.checkpoints.save(1, state(), {})
        assert os.listdir("out/checkpoints") == ["step-000001"]
        for step in (2, 3):
            folder.checkpoints.save(step, state(), {})
        assert sorted(os.listdir("out/checkpoints")) == ["step-000002", "step-000003"]
    with RunDirectory("out", few) as folder:
        assert folder.checkpoints.load().step == 3  # type: ignore[union-attr]


def test_a_killed_save_leaves_the_previous_checkpoint(recipe: Recipe) -> None:
    """A real process, killed between the state's arrival on the disk and the rename."""
    code = (
        "import os, torch\nfrom danceopd.run import checkpoints, directory\nfrom danceopd.recipe.recipe import Recipe\n"
        "folder = directory.RunDirectory('out', Recipe.from_yaml('r.yaml'))\n"
        "folder.checkpoints.save(1, {'a': torch.ones(3)}, {})\n"
        "checkpoints.sha256 = lambda path: os._exit(9)\n"
        "folder.checkpoints.save(2, {'a': torch.zeros(3)}, {})\n"
    )
    Path("r.yaml").write_text(recipe.to_yaml())
    assert program.python(code).wait() == 9
    assert any(name.startswith(".step-000002") for name in os.listdir("out/checkpoints"))
    with RunDirectory("out", recipe) as folder:
        step, tensors, *_ = folder.checkpoints.load()  # type: ignore[misc]
        assert step == 1 and tensors["a"].tolist() == [1, 1, 1]
        assert os.listdir("out/checkpoints") == ["step-000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_and_overwrites_nothing(recipe: Recipe, monkeypatch, code: int) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(1, state(1), {})

        def refuse(handle: int) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(UserError, match="the disk is full at out/checkpoints/step-000001; nothing was"):
                folder.checkpoints.save(1, state(2), {})
        assert os.listdir("out/checkpoints") == ["step-000001"]
        assert folder.checkpoints.load()[1]["lora.a"][0, 0] == 1  # type: ignore[index]


def test_metrics_on_a_full_disk(recipe: Recipe) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with RunDirectory("out", recipe) as folder:
        Path("out/metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match="the disk is full at out/metrics.jsonl"):
            folder.logger.log(1, loss=0.1)


def test_metrics_after_the_checkpoint_are_dropped_on_continuing(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        for step in range(1, 6):
            folder.logger.log(step, loss=torch.tensor(1 / step), route="editing")
            if step == 3:
                folder.checkpoints.save(step, state(), {})
        with open("out/metrics.jsonl", "a") as file:
            file.write('{"step": 3, "lo')
    with RunDirectory("out", recipe) as folder:
        restore(folder)
        folder.logger.log(4, loss=float("nan"))
        assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
        assert lines(folder)[2] == {"step": 3, "loss": pytest.approx(1 / 3), "route": "editing"}
        assert lines(folder)[3]["loss"] == "nan"


def test_metrics_of_a_run_killed_before_its_first_checkpoint_are_dropped(recipe: Recipe) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.logger.log(1, loss=1.0)
    with RunDirectory("out", recipe) as folder:
        assert restore(folder) is None
        assert lines(folder) == []


def test_tensorboard_and_samples(recipe: Recipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDirectory("out", recipe) as folder:
        folder.logger.log(1, loss=0.25)
        path = folder.logger.image(50, Image.new("RGB", (8, 8), "red"))
    assert path == Path("out/samples/step-000050.png") and Image.open(path).size == (8, 8)
    Path("out/samples/.step-000051.png.99999").write_bytes(b"of a killed run")
    RunDirectory("out", recipe).close()
    assert os.listdir("out/samples") == ["step-000050.png"]
    events = EventAccumulator("out/logs").Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25)]
    assert events.Images("samples")[0].step == 50


def test_another_run_is_left_alone(recipe: Recipe, files: dict) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(1, {"w": torch.zeros(1)}, {})
    before = Path("out/recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"holds another run \(seed is 0 there and 5 here\); choose another"):
        RunDirectory("out", Recipe(**files, output="out", seed=5))
    assert Path("out/recipe.yaml").read_bytes() == before


def test_a_run_that_learnt_nothing_makes_room(recipe: Recipe, files: dict) -> None:
    """Refused for its data, say, when it had taken the folder: the mended recipe may have it; nothing old counts."""
    with RunDirectory("out", recipe) as folder:
        folder.logger.log(0, validation=0.5)
        Path("out/data.json").write_text("{}")
        Path("out/thesis.txt").write_text("x")
        other = Recipe(**files, output="out", seed=5)
        check_directory("out", other)
        with pytest.raises(UserError, match="in use|another process"):
            RunDirectory("out", other)
        assert Path("out/data.json").exists()
    RunDirectory("out", other).close()
    assert Recipe.from_yaml("out/recipe.yaml").seed == 5
    assert not Path("out/data.json").exists()
    assert Path("out/thesis.txt").read_text() == "x"


def test_the_same_run_may_be_given_more_steps(recipe: Recipe, files: dict) -> None:
    RunDirectory("out", recipe).close()
    RunDirectory("out", Recipe(**files, output="out", steps=99)).close()
    assert Recipe.from_yaml("out/recipe.yaml").steps == 99


def test_foreign_files_are_left_alone(recipe: Recipe) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="output folder out holds files that are not a run"):
        RunDirectory("out", recipe)
    assert os.listdir("out") == ["thesis.txt"]


def test_two_processes_do_not_share_a_folder(recipe: Recipe) -> None:
    with (
        RunDirectory("out", recipe),
        pytest.raises(UserError, match="output folder out is in use by another danceopd process"),
    ):
        RunDirectory("out", recipe)
    RunDirectory("out", recipe).close()


def test_finished_means_exported_at_these_steps(recipe: Recipe, files: dict) -> None:
    with RunDirectory("out", recipe) as folder:
        folder.finish(10, loss=0.1)
        assert not folder.finished  # nothing was exported
        Path("out/pytorch_lora_weights.safetensors").write_bytes(b"x")
        assert folder.finished
    with RunDirectory("out", Recipe(**files, output="out", steps=11)) as folder:
        assert not folder.finished


def test_a_folder_that_cannot_be_written(recipe: Recipe) -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match="cannot write file/out: Not a directory"):
        RunDirectory("file/out", recipe)


def test_a_really_full_disk(recipe: Recipe, tmp_path: Path) -> None:
    """A file system of 256 KiB, where this user may mount one."""
    if not shutil.which("unshare"):
        pytest.skip("this system has no unshare")
    code = (
        "import torch\nfrom danceopd.run.directory import RunDirectory\nfrom danceopd.recipe.recipe import Recipe\n"
        "folder = RunDirectory('small/out', Recipe.from_yaml('r.yaml'))\n"
        "folder.checkpoints.save(1, {'a': torch.ones(1000)}, {})\n"
        "try:\n    folder.checkpoints.save(2, {'a': torch.zeros(100_000)}, {})\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "print(folder.checkpoints.load()[0])\n"
    )
    Path("small").mkdir()
    Path("r.yaml").write_text(recipe.to_yaml())
    script = 'mount -t tmpfs -o size=256k none small && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, code], capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this user may not mount a small file system: {done.stderr.strip()[:80]}")
    assert "UserError the disk is full at small/out/checkpoints/step-000002" in done.stdout
    assert done.stdout.splitlines()[-1] == "1"


def test_a_run_that_was_stopped_at_its_first_write_is_continued(recipe: Recipe, tmp_path: Path) -> None:
    """Killed, or on a full disk, before its recipe stood there; anything else is left alone."""
    for name in ("checkpoints", "samples"):
        (tmp_path / "out" / name).mkdir(parents=True)
    for name in (".lock", ".recipe.yaml.123"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "samples" / "mine.png").touch()
    with pytest.raises(UserError, match="holds files that are not a run"):
        check_directory("out", recipe)
    (tmp_path / "out" / "samples" / "mine.png").unlink()
    check_directory("out", recipe)
    with RunDirectory("out", recipe):
        assert sorted(os.listdir("out")) == [".lock", "checkpoints", "recipe.yaml", "samples"]


def test_checkpoints_are_in_the_order_of_their_steps(recipe: Recipe) -> None:
    """Beyond a million, too; a folder of another name is none."""
    with RunDirectory("out", recipe) as folder:
        (folder.path / "checkpoints" / "step-abc").mkdir()
        for step in (999_999, 1_000_000, 1_000_001):
            folder.checkpoints.save(step, state(), {})
        assert folder.checkpoints.load().step == 1_000_001  # type: ignore[union-attr]
        assert sorted(os.listdir("out/checkpoints")) == ["step-1000000", "step-1000001", "step-abc"]


@pytest.mark.parametrize("text", ["[]", "5", '{"step": null}', '{"step": "x"}', "{", "[" * 9999])
def test_a_damaged_mark_is_none(recipe: Recipe, text: str) -> None:
    with RunDirectory("out", recipe) as folder:
        (folder.path / "pytorch_lora_weights.safetensors").touch()
        (folder.path / "finished.json").write_text(text)
        assert not folder.finished


def test_a_checkpoint_of_another_run_is_a_sentence(recipe: Recipe) -> None:
    def load(step: int, state: dict[str, torch.Tensor]) -> None:
        raise KeyError("lora.b")

    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(3, state(), {})
        with pytest.raises(UserError, match="the checkpoint of step 3 does not hold the state of this run"):
            Checkpoints(folder, Processes("cpu"), 1, [], {}).restore(SimpleNamespace(load_state_dict=load))


def test_a_file_system_that_cannot_open_folders(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: what cannot be synced is not."""
    real = os.open

    def windows(path: str, *arguments: Any, **how: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **how)

    monkeypatch.setattr(os, "open", windows)
    with RunDirectory("out", recipe) as folder:
        folder.checkpoints.save(3, state(), {})
        assert folder.checkpoints.load().step == 3  # type: ignore[union-attr]
