"""The trial of the fused kernels on a real GPU: a process of its own judges them, and they are not wrong.

One command: `python -m pytest tests/gpu/test_trial_gpu.py`. Without a CUDA device all of it is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from walk_cases import CASES, NAMES, world

from danceopd.attention import trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_no_family_is_judged_wrong(case, dtype):
    """Tiny models may be slower; their heads of 16 columns run in torch, and their norm sites as kernels."""
    one = world(*case, device="cuda", dtype=dtype)
    verdict = trial.judge(trial.made(trial.facts_of(one.backbone.transformer)), one.conditions(), dtype)
    assert verdict.speed is not None, verdict.why


def test_a_process_of_its_own_comes_to_a_verdict():
    one = world(*CASES[NAMES.index("sd3 generation")], device="cuda", dtype=torch.bfloat16)
    verdict, keep = trial.tried(one.backbone.transformer, one.conditions())
    assert keep and verdict.speed is not None, verdict.why
