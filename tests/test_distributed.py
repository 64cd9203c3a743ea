"""Two real processes on gloo: the same student as one makes, with the whole base in each or sharded, and resumed."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import program
import pytest
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, check_student, json_lines, three_rows, two_processes

from danceopd.common import distributed
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


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_where_one_process_is_killed_the_other_ends_with_a_sentence(models: Path, tmp_path: Path, dies: int) -> None:
    """Started without a launcher, which would end the other one."""
    (tmp_path / "r.yaml").write_text(three_rows(models, tmp_path / "run", steps=100_000).to_yaml())
    port = program.free_port()
    processes = [
        program.start("merge", tmp_path / "r.yaml", cwd=tmp_path, **program.environment_of(rank, 2, port))
        for rank in range(2)
    ]
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < end and all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[dies].send_signal(signal.SIGKILL)
        assert processes[1 - dies].wait(30) == 2
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    said = processes[1 - dies].stderr
    assert said.count("error: another process of this run has ended") == 1 and "Traceback" not in said, said


def test_a_connection_that_breaks_ends_the_process_and_a_leave_does_not(monkeypatch, capsys) -> None:
    ended: list[int] = []
    monkeypatch.setattr(distributed, "LOST_GRACE", 0)
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    for leaves in (True, False):
        here, there = socket.socketpair()
        thread = threading.Thread(target=distributed._until_lost, args=(here,))
        thread.start()
        if leaves:
            distributed._leave([there])
        there.close()
        thread.join(10)
        assert ended == ([] if leaves else [2])
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")
