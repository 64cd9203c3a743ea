"""The trial of the fused kernels on a real GPU, in a process of its own: they are not wrong.

One command: `python -m pytest tests/gpu/test_autotune_gpu.py`. Without a CUDA device all of it is skipped.
"""

from __future__ import annotations

import pytest
import torch
from rollout_cases import CASES, NAMES, rollout_case

from danceopd.kernels import autotune
from danceopd.kernels.capture import CudaGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_no_family_is_wrong(case, dtype):
    """Tiny models may be slower; head dim 16 runs in torch, `add_norm` as a kernel."""
    one = rollout_case(*case, device="cuda", dtype=dtype)
    model = autotune.build_model(autotune.model_spec(one.backbone.transformer))
    verdict = autotune.evaluate(model, one.conditions(), dtype, CudaGraphs(torch.device("cuda")))
    assert verdict.speedup is not None, verdict.reason
    assert "wrong" not in verdict.graphs_reason and "captured" not in verdict.graphs_reason, verdict.graphs_reason


def test_a_process_of_its_own_returns_a_verdict():
    one = rollout_case(*CASES[NAMES.index("sd3 generation")], device="cuda", dtype=torch.bfloat16)
    verdict, keep = autotune.run_trial(one.backbone.transformer, one.conditions())
    assert keep and verdict.speedup is not None, verdict.reason
