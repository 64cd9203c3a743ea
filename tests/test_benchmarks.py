"""Every file in benchmarks/ imports with today's names and answers `--help`, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"  # not part of an installed package: then there are no cases
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
answers = {}
folder, *scripts = sys.argv[1:]
for script in scripts:
    said, code = io.StringIO(), 0
    sys.path[0], sys.argv = folder, [script, "--help"]
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = traceback.format_exc()
    answers[script] = code, said.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each script did, all in one process: torch and diffusers are imported once."""
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(BENCHMARKS), *map(str, SCRIPTS)],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not any(folder.iterdir())
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_imports_and_answers_help(script, answers):
    code, said = answers[str(script)]
    assert code == 0, code
    if "__main__" in script.read_text(encoding="utf-8"):  # the others are parts of a script
        assert "usage" in said.lower()
    else:
        assert not said
