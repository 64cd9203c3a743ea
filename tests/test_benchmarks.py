"""Every file in benchmarks/ imports with today's names and answers `--help`, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"  # not part of an installed package: then there are no cases


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_imports_and_answers_help(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if "__main__" in script.read_text(encoding="utf-8"):  # the others are parts of a script
        assert "usage" in done.stdout.lower()
    else:
        assert not done.stdout
    assert not any(tmp_path.iterdir())
