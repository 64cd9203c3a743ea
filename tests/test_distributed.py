"""Two real processes on gloo: the same student as one makes, with the whole base in each or sharded, and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, check_student, json_lines, three_rows, two_processes

from danceopd.merge import merge


@pytest.mark.slow
def test_two_processes_make_the_student_of_one(models: Path, tmp_path: Path) -> None:
    """Two updates with the whole base in each, two more with it sharded, one more alone: always the same adapter."""
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = {}
    for steps in (2, 4, 5):
        merge(three_rows(models, one, steps=steps), lambda metrics, total: None)
        wanted[steps] = load_file(one / WEIGHTS)
    moved = max((wanted[2][name] - wanted[5][name]).abs().max() for name in wanted[2])
    assert moved > 1e-4  # what follows could fail
    said = two_processes(three_rows(models, two, steps=2), tmp_path)
    assert said.count("student:") == 1, said
    check_student(two, wanted[2])
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == ["step-000002"]
    two_processes(three_rows(models, two, steps=4, parallel="fsdp"), tmp_path)
    check_student(two, wanted[4])
    merge(three_rows(models, two, steps=5), lambda metrics, total: None)
    check_student(two, wanted[5])
    theirs, ours = json_lines(two / "metrics.jsonl"), json_lines(one / "metrics.jsonl")
    assert [line["step"] for line in theirs] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(theirs[1:], ours[1:]):
        for key in ("loss", "grad_norm", "query_sigma"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    states = [load_file(folder / "checkpoints" / "step-000004" / "state.safetensors") for folder in (one, two)]
    assert states[0].keys() == {name for name in states[1] if not name.startswith("rng1.")}
    assert all(states[0][name].shape == states[1][name].shape for name in states[0])


@pytest.mark.slow
def test_a_refusal_is_said_once(models: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(models / "edits", tmp_path / "edits") / WEIGHTS
    wanted = three_rows(models, tmp_path / "run", editing=str(tmp_path / "edits"))
    broken.write_bytes(b"cut")
    said = two_processes(wanted, tmp_path, fails=True)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "edits" in errors[0], said
    assert not (tmp_path / "run").exists()
