"""SIGTERM, SIGHUP and Ctrl-C at two moments of every long command: it ends soon, with a word and 128 + the signal, and
the same command can be run again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import program
import pytest
import report_folders

from danceopd.common.shipped import shipped

SHORT = "{steps: 100000, batch: 4, data: {rows: 6}, samples: {every: 0, count: 1}, validation: {every: 0}}"
COMMANDS: dict[str, tuple[list[str], str]] = {
    "merge": (["merge", "r.yaml", "-o", "out"], "out/metrics.jsonl"),
    "plan": (["plan", "r.yaml"], ""),
    "sample": (["sample", "generation", "a red circle", "-n", "10000", "-o", "out"], "out/*.png"),
    "bench": (["bench", "generation", "--against", "none", "-o", "out"], "out/images"),
    "audit": (["audit", "-o", "out"], "out/questions.jsonl"),
    "compare": (["compare", "a", "b", "-o", "out", "--judge", f"cmd:{sys.executable} judge.py"], "out/judge.jsonl"),
    "teach": (["teach", "editing", "--steps", "100000", "-o", "out"], "out/.training"),
    "extract": (["extract", "base", "./other", "-o", "out"], ""),
    "blend": (["blend", "generation", "editing", "-r", "8", "-o", "out"], ""),
    "export": (["export", "generation", "--format", "kohya", "-o", "out"], ""),
}
"""Each long command, and what is there once it does its work; empty: it is stopped while it opens its files."""
JUDGE = """import json, sys, time
for line in sys.stdin:
    time.sleep(1)
    print(json.dumps({"key": json.loads(line)["key"], "text": "A"}), flush=True)
"""


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """The program with its own imports."""
    return subprocess.Popen(
        [sys.executable, "-m", "danceopd", *arguments], cwd=folder, stderr=subprocess.PIPE, text=True,
        # A shell's background job, as CI may be, starts with signals ignored, and children inherit that.
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip


def wait(process: Any, there: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def hears(process: Any) -> bool:
    """Whether the program has begun to handle signals: before that it is Python that starts."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def stopped(process: program.Running, number: int, again: bool) -> None:
    """Send a signal, and check how the process ends; `again`: it says that it can be continued."""
    process.send_signal(number)
    assert process.wait(40) == 128 + number, process.stderr
    said = process.stderr
    assert "Traceback" not in said and "Exception ignored" not in said, said
    last = said.splitlines()[-1]
    assert last == "stopped; run the same command again to continue" or (last == "stopped" and not again), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_while_it_is_imported(tmp_path: Path, number: int) -> None:
    """Before there is a command that could say anything: quietly."""
    for delay in (0, 0.1, 0.5):
        process = start(["plan"], tmp_path)
        wait(process, lambda process=process: hears(process))  # type: ignore[misc]
        time.sleep(delay)
        process.send_signal(number)
        _, said = process.communicate(timeout=40)
        assert process.returncode in (128 + number, -number), said  # a shell says 128 + number of both
        # Python's own decimal module says this line when its import is broken off and begun again.
        ours = [line for line in said.splitlines() if line and "mpd_setminalloc" not in line]
        assert ours in ([], ["stopped"]), said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_while_it_works(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "r.yaml").write_text(SHORT)
    arguments, there = COMMANDS[name]
    again = name in ("audit", "merge", "bench", "compare", "teach")
    if name == "extract":
        shutil.copytree(shipped("base"), tmp_path / "other")
    if name == "compare":
        (tmp_path / "judge.py").write_text(JUDGE)
        for seed, folder in enumerate("ab"):
            report_folders.scenes(tmp_path / folder, each=1, seed=seed)
    for times in range(2 if again else 1):  # the second time it is still being imported
        process = program.start(*arguments, cwd=tmp_path)
        wait(process, lambda process=process: hears(process))  # type: ignore[misc]
        if there and not times:
            wait(process, lambda: list(tmp_path.glob(there)))
        stopped(process, number, again and not times)


def test_nohup_is_heard(tmp_path: Path) -> None:
    """What a shell ignores for a command stays ignored."""
    command = [sys.executable, "-m", "danceopd", "inspect", "generation"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait(process, lambda: hears(process))  # it has decided which signals end it, and has its work before it
    process.send_signal(signal.SIGHUP)
    assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 0
