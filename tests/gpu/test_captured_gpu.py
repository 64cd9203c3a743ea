"""Recorded walks on a GPU: real graphs of every family, across updates and layouts, and what a refusal leaves behind.

One command: `python -m pytest tests/gpu/test_captured_gpu.py`. Without a CUDA device all of it is skipped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from walk_cases import CASES, NAMES, walks, world

from danceopd.attention import installed
from danceopd.captured import CapturedField, CudaGraphs
from danceopd.fields import MergedField
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.family import as_it_is

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_recorded_walks_are_the_walks(case, fused):
    """Ragged walks, three updates, two sets of prompts and sources; graphs share their memory, and run in any order."""
    one = world(*case, device="cuda")
    if fused:
        with installed(one.backbone.transformer):
            found, field = walks(one, graphs())
    else:
        found, field = walks(one, graphs())
    for recorded, same, stock in found:
        assert (recorded - same).abs().max() < 1e-5 and (recorded - stock).abs().max() < 1e-4
    assert len(field) >= 3 and field.off is None and not field._refused


def test_half_precision():
    one = world(*CASES[NAMES.index("sd3 generation")], device="cuda", dtype=torch.bfloat16)
    found, field = walks(one, graphs())
    for recorded, same, _ in found:
        assert (recorded - same).abs().max() < 2e-2 * same.abs().max()
    assert field.off is None and not field._refused


def test_a_forward_that_waits_is_refused_and_harms_nothing(monkeypatch, caplog):
    """Qwen-Image reading its lengths back: refused at the rehearsal, and the next capture works."""
    monkeypatch.setitem(FAMILIES, "qwen-image", replace(FAMILIES["qwen-image"], still=as_it_is))
    one, recorder = world(*CASES[NAMES.index("qwen-image generation")], device="cuda"), graphs()
    plain = MergedField(one.backbone, "student")
    field, condition = CapturedField(plain, recorder, after=1), one.conditions()
    x, sigma = one.noise(1, 2, 3), torch.full((3,), 0.5, device="cuda")
    assert (field(x, sigma, condition) - plain(x, sigma, condition)).abs().max() < 1e-5
    assert len(field) == 0 and field.off is None and "its forward waits for the device" in caplog.text
    assert torch.cuda.get_sync_debug_mode() == 0
    other = world(*CASES[NAMES.index("flux2-klein generation")], device="cuda")
    found, field = walks(other, recorder)
    assert len(field) >= 3 and all((a - b).abs().max() < 1e-5 for a, b, _ in found)


def test_memory_comes_back():
    """Dropped graphs give their memory to the next ones: recording again and again does not grow."""
    one = world(*CASES[NAMES.index("flux2-klein generation")], device="cuda")
    field = CapturedField(MergedField(one.backbone, "student"), graphs(), after=1, most=2)
    condition, sigma = one.conditions(), torch.full((3,), 0.5, device="cuda")
    taken = []
    for turn in range(12):
        count = turn % 3 + 1
        field(one.noise(*range(count)), sigma[:count], condition.rows(list(range(count))))
        taken.append(torch.cuda.memory_reserved())
    assert len(field) == 2 and taken[-1] <= taken[5] + 2**22
