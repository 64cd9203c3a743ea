"""Two real processes on gloo: the same student as one makes, with the whole base in each or sharded, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import WEIGHTS, models, recipe

from danceopd.merge import merge
from danceopd.recipe.recipe import Recipe

__all__ = ["models"]  # the fixture


def made(models: Path, output: Path, **fields: object) -> Recipe:
    """Three rows an update, so that one process has two and the other one; constant rate, so that it can go on."""
    return recipe(models, output, batch=3, optimizer={"warmup": 1}, **fields)


def launch(wanted: Recipe, folder: Path, expect: int = 0) -> str:
    """`torchrun --nproc-per-node 2 -m danceopd merge`; what it said."""
    file = folder / "r.yaml"
    file.write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "danceopd", "merge", str(file)],
        env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode != 0) == bool(expect), done.stderr[-4000:]
    return done.stderr + done.stdout


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def check(output: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = load_file(output / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_make_the_student_of_one(models: Path, tmp_path: Path) -> None:
    """Two updates with the whole base in each, two more with it sharded, one more alone: always the same adapter."""
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = {}
    for steps in (2, 4, 5):
        merge(made(models, one, steps=steps), lambda done, total: None)
        wanted[steps] = load_file(one / WEIGHTS)
    moved = max((wanted[2][name] - wanted[5][name]).abs().max() for name in wanted[2])
    assert moved > 1e-4  # what follows could fail
    said = launch(made(models, two, steps=2), tmp_path)
    assert said.count("student:") == 1, said
    check(two, wanted[2])
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == ["step-000002"]
    launch(made(models, two, steps=4, parallel="fsdp"), tmp_path)
    check(two, wanted[4])
    merge(made(models, two, steps=5), lambda done, total: None)
    check(two, wanted[5])
    theirs, ours = metrics(two), metrics(one)
    assert [line["step"] for line in theirs] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(theirs[1:], ours[1:]):
        for key in ("loss", "gradient", "sigma"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    states = [load_file(folder / "checkpoints" / "step-000004" / "state.safetensors") for folder in (one, two)]
    assert states[0].keys() == {name for name in states[1] if not name.startswith("rng1.")}
    assert all(states[0][name].shape == states[1][name].shape for name in states[0])


@pytest.mark.slow
def test_a_refusal_is_said_once(models: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(models / "edits", tmp_path / "edits") / WEIGHTS
    wanted = made(models, tmp_path / "run", editing=str(tmp_path / "edits"))
    broken.write_bytes(b"cut")
    said = launch(wanted, tmp_path, expect=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "edits" in errors[0], said
    assert not (tmp_path / "run").exists()
