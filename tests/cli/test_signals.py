"""SIGTERM, SIGHUP and Ctrl-C at two moments of every long command: it ends soon, with a word and 128 + the signal, and
the same command can be run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

SHORT = "{steps: 100000, batch: 4, data: {rows: 6}, samples: {every: 0, count: 1}, validation: {every: 0}}"
COMMANDS: dict[str, tuple[list[str], str]] = {
    "merge": (["merge", "r.yaml", "-o", "out"], "out/metrics.jsonl"),
    "plan": (["plan", "r.yaml"], ""),
    "sample": (["sample", "generation", "a red circle", "-n", "10000", "-o", "out"], "out/*.png"),
    "bench": (["bench", "generation", "--against", "none", "-o", "out"], "out/images"),
    "compare": (["compare", "lost", "lost", "-o", "out"], ""),
    "teach": (["teach", "editing", "--steps", "100000", "-o", "out"], "out/.training"),
    "extract": (["extract", "base", "./other", "-o", "out"], ""),
    "blend": (["blend", "generation", "editing", "-r", "8", "-o", "out"], ""),
    "export": (["export", "generation", "--format", "kohya", "-o", "out"], ""),
}
"""Each long command, and what is there once it does its work; empty: it is stopped while it opens its files."""


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "danceopd", *arguments], cwd=folder, env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job, as CI may be, starts with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait(process: subprocess.Popen[str], there: Callable[[], object], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.stderr and process.stderr.read()
        time.sleep(0.05)


def stopped(process: subprocess.Popen[str], number: int, again: bool) -> None:
    """Send a signal, and check how the process ends."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    assert not errors or errors.endswith("stopped; run the same command again to continue\n" if again else "stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_while_it_is_imported(tmp_path: Path, number: int) -> None:
    """Before there is a command that could say anything: quietly."""
    for delay in (0.15, 0.3, 0.6):
        process = start(["plan"], tmp_path)
        time.sleep(delay)
        stopped(process, number, False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_while_it_works(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "r.yaml").write_text(SHORT)
    arguments, there = COMMANDS[name]
    process = start(arguments, tmp_path)
    if there:
        wait(process, lambda: list(tmp_path.glob(there)))
    else:
        time.sleep(1.5)
    stopped(process, number, name in ("merge", "bench", "compare", "teach"))
    if there and name != "sample":
        process = start(arguments, tmp_path)
        time.sleep(3)
        assert process.poll() is None
        stopped(process, number, True)


def test_nohup_is_heard(tmp_path: Path) -> None:
    """What a shell ignores for a command stays ignored."""
    command = [sys.executable, "-m", "danceopd", "inspect", "generation"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
