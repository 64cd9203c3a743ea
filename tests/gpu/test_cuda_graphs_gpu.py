"""Captured rollouts on a GPU: real graphs of every family, across updates and layouts, and after a refused capture.

One command: `python -m pytest tests/gpu/test_cuda_graphs_gpu.py`. Without a CUDA device all of it is skipped.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout_cases import CASES, NAMES, rollout_case, rollouts

from danceopd.kernels import installed
from danceopd.kernels.capture import CudaGraphs
from danceopd.models.cuda_graphs import CapturedField
from danceopd.models.fields import MergedField
from danceopd.pipelines.family import unchanged_condition
from danceopd.pipelines.registry import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_captured_rollouts_are_the_eager_ones(case, fused):
    """Ragged rollouts, three updates, two sets of prompts and sources; graphs share memory and run in any order."""
    one = rollout_case(*case, device="cuda")
    if fused:
        with installed(one.backbone.transformer):
            found, field = rollouts(one, graphs())
    else:
        found, field = rollouts(one, graphs())
    for captured, same, stock in found:
        assert (captured - same).abs().max() < 1e-5 and (captured - stock).abs().max() < 1e-4
    assert field.graph_count >= 3 and field.off is None and not field._refused


def test_half_precision():
    one = rollout_case(*CASES[NAMES.index("sd3 generation")], device="cuda", dtype=torch.bfloat16)
    found, field = rollouts(one, graphs())
    for captured, same, _ in found:
        assert (captured - same).abs().max() < 2e-2 * same.abs().max()
    assert field.off is None and not field._refused


def test_a_forward_that_waits_is_refused_and_harms_nothing(monkeypatch, caplog):
    """Qwen-Image reading its lengths back: refused in the dry run, and the next capture works."""
    monkeypatch.setitem(FAMILIES, "qwen-image", replace(FAMILIES["qwen-image"], sync_free=unchanged_condition))
    one, capture = rollout_case(*CASES[NAMES.index("qwen-image generation")], device="cuda"), graphs()
    plain = MergedField(one.backbone, "student")
    field, condition = CapturedField(plain, capture, min_calls=1), one.conditions()
    x, sigma = one.noise(1, 2, 3), torch.full((3,), 0.5, device="cuda")
    assert (field(x, sigma, condition) - plain(x, sigma, condition)).abs().max() < 1e-5
    assert field.graph_count == 0 and field.off is None and "its forward waits for the device" in caplog.text
    assert torch.cuda.get_sync_debug_mode() == 0
    other = rollout_case(*CASES[NAMES.index("flux2-klein generation")], device="cuda")
    found, field = rollouts(other, capture)
    assert field.graph_count >= 3 and all((a - b).abs().max() < 1e-5 for a, b, _ in found)


def test_memory_comes_back():
    """Dropped graphs give their memory to the next ones: capturing again and again does not grow."""
    one = rollout_case(*CASES[NAMES.index("flux2-klein generation")], device="cuda")
    field = CapturedField(MergedField(one.backbone, "student"), graphs(), min_calls=1, max_graphs=2)
    condition, sigma = one.conditions(), torch.full((3,), 0.5, device="cuda")
    taken = []
    for turn in range(12):
        count = turn % 3 + 1
        field(one.noise(*range(count)), sigma[:count], condition.rows(list(range(count))))
        taken.append(torch.cuda.memory_reserved())
    assert field.graph_count == 2 and taken[-1] <= taken[5] + 2**22
