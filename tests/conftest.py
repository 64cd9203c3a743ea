"""What every test shares: few threads, the program as a real process, and a recipe of files that exist."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "DANCEOPD_CACHE" not in os.environ:  # nothing of a test outlives it, nor reaches another session's
    os.environ["DANCEOPD_CACHE"] = tempfile.mkdtemp(prefix="danceopd-cache-")
    atexit.register(shutil.rmtree, os.environ["DANCEOPD_CACHE"], ignore_errors=True)

import program
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored

Program = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_finish() -> None:
    """Whatever the imports made stays: later collections of garbage need not look through a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def danceopd(tmp_path: Path) -> Program:
    """`danceopd("merge", "--steps", 0)` runs the program in an empty folder and returns what it did."""
    return partial(program.run, cwd=tmp_path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A base and two adapters that exist, as recipe fields; the current folder is an empty one."""
    for name in ("base", "draws", "edits"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return {"base": "models/base", "generation": "models/draws", "editing": "models/edits"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `draws` and `edits` (`tiny_merge.tiny_models`), for tests that write nothing there."""
    from tiny_merge import tiny_models

    return tiny_models(tmp_path_factory.mktemp("models"))
