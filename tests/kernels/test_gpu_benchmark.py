"""`benchmarks/gpu.py` without a GPU: a failing line does not stop the others, and each part keeps to its time."""

from __future__ import annotations

from pathlib import Path

import program
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VARIANTS = [
    "stock modules", "kernels auto", "kernels auto, CUDA graphs", "kernels auto, gradient checkpointing",
    "kernels auto, merged: false", "base_dtype: nf4", "offload: blocks",
]  # fmt: skip
# Segments of 100 seconds each, of which the fused form fails, and a model that cannot be made.
CODE = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu, torch
def broken(*args, **kwargs): raise torch.cuda.OutOfMemoryError("no memory\\nat all")
late, clock, stock = [0], time.monotonic, gpu.gpu_segments.one_segment
def slow(*args):
    late[0] += 100
    return stock(*args)
time.monotonic = lambda: clock() + late[0]
gpu.gpu_segments.one_segment, gpu.gpu_segments.Segment.fused, gpu.gpu_forwards.klein = slow, broken, broken
gpu.app()
"""


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of an installed package")
def test_a_failing_line_does_not_stop_the_others(tmp_path):
    out = tmp_path / "table.md"
    done = program.python(CODE, "kernels", "--smoke", "-o", out, COLUMNS=300)
    assert done.wait() == 1, done.stderr  # what fails in a smoke test is a fault
    lines = out.read_text(encoding="utf-8").splitlines()
    assert "- SD3.5-M 64 px, cuda: OutOfMemoryError: no memory" in lines
    assert "- klein-4B 64 px + source: OutOfMemoryError: no memory" in lines
    count = lambda *words: sum(all(word in line for word in words) for line in lines)  # noqa: E731
    assert count("| fwd |", "64 px") >= 2 and count("| fwd + bwd |", "64 px") >= 1
    others = "| add_norm", "| SwiGLU", "| Z-Image 64 px | no-gradient", "| z-image 64 px, 4", "| klein-4B, dense"
    for begin in others:
        assert any(line.startswith(begin) for line in lines), begin
    assert not count("| flux2-klein")


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of an installed package")
@pytest.mark.slow
def test_a_real_merge_in_every_variant(tmp_path):
    """Tiny, on the CPU: every variant merges and exports, and stands beside its plan."""
    out = tmp_path / "merge.md"
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; gpu.app()"
    done = program.python(code, "real_merge", "--smoke", "-o", out)
    status, text = done.wait(), out.read_text(encoding="utf-8")
    assert status == 0, text + done.stderr
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if " | 64 | " in line]
    assert [line[0] for line in lines] == VARIANTS
    assert all(float(line[5]) > 0 and float(line[7]) > 0 for line in lines)  # planned
    assert "Not measured" not in text
