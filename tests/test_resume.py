"""A run that is stopped in any way goes on to the same bytes; with other weights or another recipe it does not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import program
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_adapter, random_image, tiny_klein
from tiny_merge import WEIGHTS, Killed, tiny_recipe

from danceopd.adapters.load import load_student
from danceopd.adapters.write import write_adapter
from danceopd.bench.lineup import build_lineup
from danceopd.data.dataset import open_datasets
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.optimizer import StudentOptimizer
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.recipe.recipe import Recipe
from danceopd.run.directory import RunDirectory
from danceopd.run.provenance import check_data, start_from

STEPS = 24


def recipe(models: Path, output: Path, **fields: object) -> Recipe:
    given = {
        "steps": STEPS, "batch": 2, "data": {"rows": 4}, "optimizer": {"schedule": "cosine"},
        "call": {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 24},
    }  # fmt: skip
    return tiny_recipe(models, output, **{**given, **fields})


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The student of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "student"
    merge(recipe(models, output), lambda metrics, steps: None)
    return (output / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_killed_again_and_again_it_makes_the_same_student(models: Path, whole: bytes, tmp_path: Path) -> None:
    """Five SIGKILLs at random moments of training and saving, a SIGTERM, then left alone: real processes."""
    output, moments = tmp_path / "run", random.Random(5)
    (tmp_path / "r.yaml").write_text(recipe(models, output).to_yaml())

    def saved() -> set[str]:
        return {path.name for path in (output / "checkpoints").glob("step-*")}

    for life in range(6):
        before, process = saved(), program.start("merge", tmp_path / "r.yaml")
        while not saved() - before:
            assert process.poll() is None, process.stderr
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL if life < 5 else signal.SIGTERM)
        process.wait()
    assert process.returncode == 143 and "is saved in" in process.stderr, process.stderr
    assert "run the same command again to continue" in process.stderr
    assert not (output / WEIGHTS).exists()
    assert program.run("merge", tmp_path / "r.yaml").returncode == 0
    assert (output / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize(
    "number, ends, status", [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, 0)]
)
def test_signals_save_the_update_at_hand(
    models: Path, whole: bytes, tmp_path: Path, capsys, number: int, ends: type[BaseException], status: int
) -> None:
    def stop(metrics, steps):
        if metrics.step == 3:  # it comes between two updates: the next is learnt, and saved though none was due
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(ends) as stopped:
        merge(recipe(models, tmp_path / "run", save_every=100), stop)
    assert not status or stopped.value.code == status  # type: ignore[attr-defined]
    assert f"step 4 of {STEPS} is saved" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]
    assert signal.getsignal(number) == before
    steps = []
    merge(recipe(models, tmp_path / "run"), lambda metrics, total: steps.append(metrics.step))
    assert steps == list(range(5, STEPS + 1))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole


def test_what_changed_is_named_and_the_run_left_alone(models: Path, tmp_path: Path) -> None:
    def stop(metrics, steps):
        if metrics.step == 2:
            raise Killed

    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    with pytest.raises(Killed):
        merge(recipe(mine, tmp_path / "run"), stop)
    checkpoints = sorted(p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    with pytest.raises(UserError, match=r"holds another run \(optimizer.lr is 0.0002 there and 0.5 here\)"):
        merge(recipe(mine, tmp_path / "run", optimizer={"schedule": "cosine", "lr": 0.5}), stop)
    write_adapter(random_adapter(tiny_klein().transformer, seed=9, size=0.1), mine / "edits")
    with pytest.raises(UserError, match="teacher 'editing' is no longer what the run in .* began with"):
        merge(recipe(mine, tmp_path / "run"), stop)
    shutil.copytree(models / "edits", mine / "edits", dirs_exist_ok=True)
    tiny_klein(seed=1).transformer.save_pretrained(mine / "base" / "transformer")
    with pytest.raises(UserError, match="the base is no longer what the run in .* began with"):
        merge(recipe(mine, tmp_path / "run"), stop)
    assert checkpoints == sorted(p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))


@pytest.fixture
def sources(models: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """A recipe on forty prompts in a file and five edits in a folder, of which it samples a few and all."""
    (tmp_path / "p.txt").write_text("\n".join(f"a red circle {i}" for i in range(40)))
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(5):
        random_image(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"make it blue {i}")
    data = {"generation": str(tmp_path / "p.txt"), "editing": str(folder)}
    return recipe(models, tmp_path / "run", data=data, steps=8), folder


def test_data_that_changed_is_named_and_the_run_left_alone(sources: tuple[Recipe, Path], tmp_path: Path) -> None:
    def stop(metrics, steps):
        if metrics.step == 2:
            raise Killed

    wanted, _ = sources
    with pytest.raises(Killed):
        merge(wanted, stop)
    left = sorted(p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    prompts = tmp_path / "p.txt"
    drawn = open_datasets(wanted)["generation"].rows
    lines = prompts.read_text().splitlines()
    lines[drawn[-1]] += " on a blue square"
    prompts.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"p.txt, line {drawn[-1] + 1} is no longer what the run in .*run began with"):
        merge(wanted, stop)
    assert left == sorted(p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))


def test_what_of_the_data_may_change(sources: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Rows that no update samples and the times of files, not a row, a picture or the number of rows; a run that is
    given more steps is held to those it had."""
    wanted, folder = sources
    run, prompts = tmp_path / "run", tmp_path / "p.txt"
    run.mkdir()

    def check(steps: int = 8) -> None:
        more = wanted.model_copy(update={"steps": steps})
        check_data(run, more, open_datasets(more))

    check()
    drawn = set(open_datasets(wanted)["generation"].rows)
    later = sorted(set(open_datasets(wanted.model_copy(update={"steps": 20}))["generation"].rows) - drawn)
    lines = prompts.read_text().splitlines()
    lines[later[0]] = "a green star"
    prompts.write_text("\n".join(lines))
    os.utime(folder / "0.png", (1, 1))
    check()
    check(20)  # from here that row counts
    check()
    prompts.write_text("\n".join([*lines[: later[0]], "a green ring", *lines[later[0] + 1 :]]))
    for steps in (20, 8, 30):
        with pytest.raises(UserError, match=f"p.txt, line {later[0] + 1} is no longer"):
            check(steps)
    prompts.write_text("\n".join([*lines, "one more"]))
    with pytest.raises(UserError, match="p.txt has 41 rows and had 40 when the run"):
        check(20)
    prompts.write_text("\n".join(lines))
    check(20)
    random_image(0, 128, 128).save(folder / "3.png")
    with pytest.raises(UserError, match="3.txt is no longer"):
        check(20)
    (run / "data.json").write_text("{")
    with pytest.raises(UserError, match="data.json is damaged"):
        check(20)


# -- moved, started anew, diverged ------------------------------------------------------------------------


def silent(metrics: object, steps: int) -> None:
    pass


QUICK = {"validation": {"every": 0}, "save_every": 1, "optimizer": {"warmup": 1}}


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two teachers, prompts, pairs and a run of two steps: it is copied, not changed."""
    folder = shutil.copytree(models, tmp_path_factory.mktemp("project") / "project")
    (folder / "p.txt").write_text("a red circle\na blue square\na ring")
    (folder / "pairs").mkdir()
    for i in range(2):
        random_image(i).save(folder / "pairs" / f"{i}.png")
        (folder / "pairs" / f"{i}.txt").write_text(f"make it blue {i}")
    merge(of_project(folder, steps=2), silent)
    return folder


def of_project(folder: Path, **fields: object) -> Recipe:
    data = {"generation": str(folder / "p.txt"), "editing": str(folder / "pairs")}
    return recipe(folder, **{"output": folder / "run", **QUICK, "data": data, **fields})  # type: ignore[arg-type]


def test_a_project_that_moved_goes_on_and_samples(project: Path, tmp_path: Path) -> None:
    """What base, teachers and data are counts, not where they were."""
    moved = Path(shutil.copytree(project, tmp_path / "moved"))
    hidden = project.rename(project.with_name("gone"))
    try:
        assert load_student(moved / "run") is not None  # the base is found beside the run, as it was
        steps = []
        merge(of_project(moved, steps=3), lambda metrics, total: steps.append(metrics.step))
        assert steps == [3] and f"base: {moved}/base" in (moved / "run" / "recipe.yaml").read_text()
        shutil.move(moved / "base", tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"base of .* is no longer at .*; give its folder with --base"):
            load_student(moved / "run")
        assert load_student(moved / "run", base=tmp_path / "elsewhere") is not None
    finally:
        hidden.rename(project)


@pytest.mark.parametrize("steps", [2, 3])  # the run has ended, or goes on
def test_what_lies_elsewhere_and_is_another_thing_is_refused(project: Path, tmp_path: Path, steps: int) -> None:
    mine = Path(shutil.copytree(project, tmp_path / "mine"))
    shutil.copytree(mine / "edits", mine / "copy")
    other = write_adapter(random_adapter(tiny_klein().transformer, seed=9, size=0.1), mine / "other").parent
    prompts = mine / "q.txt"
    prompts.write_text("a red circle\na blue square\na star")
    kept = (mine / "run" / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="teacher 'editing' is no longer what the run in"):
        merge(of_project(mine, steps=steps, editing=str(other)), silent)
    data = {"generation": str(prompts), "editing": str(mine / "pairs")}
    with pytest.raises(UserError, match="q.txt, line 3 is no longer what the run"):
        merge(of_project(mine, steps=steps, data=data), silent)
    with pytest.raises(UserError, match="holds another run .data.generation is"):
        merge(of_project(mine, steps=steps, data={**data, "generation": "scenes"}), silent)
    shutil.copytree(mine / "base", mine / "base2")
    (mine / "base2" / "scheduler" / "scheduler_config.json").write_text(
        (mine / "base" / "scheduler" / "scheduler_config.json").read_text() + " "
    )
    with pytest.raises(UserError, match="what encodes prompts and images in the base is no longer what"):
        merge(of_project(mine, steps=steps, base=str(mine / "base2")), silent)
    assert (mine / "run" / "recipe.yaml").read_text() == kept
    merge(of_project(mine, steps=steps, editing=str(mine / "copy")), silent)
    assert f"adapter: {mine}/copy" in (mine / "run" / "recipe.yaml").read_text()


def test_a_new_run_starts_at_an_old_student(project: Path, tmp_path: Path, caplog) -> None:
    """At its EMA, exactly, from the student or a checkpoint; with another rate, which the old folder refuses."""
    old = Path(shutil.copytree(project / "run", tmp_path / "old"))
    with pytest.raises(UserError, match=r"optimizer.lr is .* with --from .*old to start at what that run learnt"):
        merge(of_project(project, output=old, optimizer={"lr": 0.5}), silent)
    wanted = of_project(project, output=tmp_path / "new", optimizer={"lr": 1e-9, "warmup": 1}, steps=1)
    started = start_from(wanted, old)
    student = load_file(old / WEIGHTS)
    shutil.rmtree(old)
    merge(started, silent)
    again = load_file(tmp_path / "new" / WEIGHTS)
    assert all(torch.allclose(again[name], tensor, atol=1e-7) for name, tensor in student.items())
    card = (tmp_path / "new" / "README.md").read_text()
    assert "The student started as the EMA of the run 'old' after step 2, of rank 8, exactly." in card
    more = wanted.model_copy(update={"steps": 2})
    assert start_from(more, old).student.init == started.student.init  # what has begun needs the old run no more
    assert not caplog.records
    start_from(more, project / "other")
    assert "is not read" in caplog.text and "the run 'old'" in caplog.text
    caplog.clear()
    shutil.copytree(project / "run", old)
    (old / WEIGHTS).unlink()
    from_checkpoint = start_from(of_project(project, output=tmp_path / "third"), old)
    assert all(
        torch.equal(load_file(tmp_path / "third" / "start" / WEIGHTS)[name], tensor) for name, tensor in student.items()
    )
    assert from_checkpoint.student.init == str(tmp_path / "third" / "start")
    steps = []
    merge(start_from(more, old), lambda metrics, total: steps.append(metrics.step))
    assert steps == [2] and not caplog.records  # it goes on
    fresh = more.replaced({"output": tmp_path / "fourth"})
    for broken, words in (
        (fresh.replaced({"student.rank": 4}), "has rank 8 and student.rank is 4; set student.rank 8"),
        (more.replaced({"output": old}), "is the output folder itself"),
        (more.replaced({"output": project / "run"}), "holds a run that began without --from"),
    ):
        with pytest.raises(UserError, match=words):
            start_from(broken, old)
    with pytest.raises(UserError, match="no run with a student or a checkpoint"):
        start_from(fresh, project / "base")
    other = tiny_klein(tmp_path / "base2", seed=1)
    assert other is not None
    with pytest.raises(UserError, match="was trained on another base than"):
        start_from(fresh.replaced({"base": str(tmp_path / "base2")}), old)


def test_a_bench_takes_the_teachers_that_a_run_learnt_from(project: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(project / "run", tmp_path / "run"))
    for student in (run, run / WEIGHTS):
        assert build_lineup(student, ["teachers"]).names("teacher")
    known = json.loads((run / "teachers.json").read_text())
    name = next(name for name, one in known["teachers"].items() if one["sha256"])
    known["teachers"][name]["sha256"] = "0" * 64
    (run / "teachers.json").write_text(json.dumps(known))
    for student in (run, run / WEIGHTS):
        with pytest.raises(UserError, match=f"teacher '{name}' in .* is not what the student in .* learnt from"):
            build_lineup(student, ["teachers"])
    (run / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="recipe.yaml is empty"):
        build_lineup(run, ["teachers"])


def test_advice_after_nan_can_be_followed_in_the_same_folder(project: Path, tmp_path: Path, monkeypatch) -> None:
    """The run goes on from the last checkpoint whose state gave no NaN, with another rate and nothing else."""
    measured = StudentOptimizer.step
    broken = {4, 5, 6, 7, 8}  # what update 3 made gives NaN

    def step(self: StudentOptimizer, step: int, metrics: StepMetrics) -> None:
        if step + 1 in broken and self.options.lr > 1e-4:
            metrics.loss = float("nan")
        measured(self, step, metrics)

    monkeypatch.setattr(StudentOptimizer, "step", step)
    wanted = of_project(project, output=tmp_path / "run", steps=9, keep_last=2)
    with pytest.raises(UserError, match="5 updates in a row at step 8; lower optimizer.lr .*goes on after step 2"):
        merge(wanted, silent)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    with RunDirectory(tmp_path / "good", of_project(project, output=tmp_path / "good")) as run:
        for number in (1, 3):  # states that a monitor called good, the second of which gives NaN
            (run.path / "checkpoints" / f"good-00000{number}").mkdir(parents=True)
        run.diverged(3, 1e-3)
        assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["good-000001"]
    with pytest.raises(UserError, match="holds another run .seed is 0 there"):
        merge(wanted.model_copy(update={"seed": 1}), silent)
    lower, steps = wanted.replaced({"optimizer.lr": 1e-5}), []
    merge(lower, lambda metrics, total: steps.append(metrics.step))
    assert steps == [3, 4, 5, 6, 7, 8, 9]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "After step 3 the loss was not finite with optimizer.lr 0.0002; the run went on from step 2" in card
    with pytest.raises(UserError, match="holds another run .optimizer.lr is 1e-05 there"):  # no longer
        merge(wanted, silent)
    early = of_project(project, output=tmp_path / "early", steps=9, keep_last=1)
    broken.update({2, 3})
    with pytest.raises(UserError, match="at step 6; .*starts anew"):
        merge(early, silent)
    assert not list((tmp_path / "early" / "checkpoints").iterdir())
