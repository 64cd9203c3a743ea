"""`kernels: auto`: the fused kernels are installed where a trial finds them right and faster, and nowhere else."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from rollout_cases import CASES, NAMES, rollout_case
from tape import Tape
from tinies import KLEIN
from torch.nn.functional import scaled_dot_product_attention

from danceopd.kernels import autotune, backend, functional, uninstall
from danceopd.kernels.autotune import (
    ROOT,
    Verdict,
    build_model,
    cached_verdict,
    evaluate,
    install_if_faster,
    run_trial,
    source_files,
    verdict_file,
)
from danceopd.kernels.capture import NotCapturable
from danceopd.kernels.processors import FusedProcessor

CUDA = torch.device("cuda")
HALF = [i for i, name in enumerate(NAMES) if name in ("flux2-klein editing", "sd3 generation", "z-image editing")]


@pytest.fixture(scope="module")
def klein():
    case = rollout_case(KLEIN, "generation")
    return case.backbone.transformer, case.conditions()


@pytest.fixture
def at_once(monkeypatch):
    """The fused modules run as custom operators, and take half as long as the stock ones."""
    monkeypatch.setattr(autotune, "_seconds", lambda model, calls, device: [[2.0, 1.0], [4.0, 2.0]])
    monkeypatch.setattr(autotune, "_in_turn", lambda calls, device: [3.0, 2.0])
    with backend.using("op"):
        yield


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """As on a machine with a GPU that can run the kernels, with an empty cache."""
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    monkeypatch.setattr(backend, "active", lambda device: device)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_family_is_evaluated(case, at_once):
    """Built from a specification that JSON can hold, with the condition that the merge has."""
    one = rollout_case(*case)
    spec = json.loads(json.dumps(autotune.model_spec(one.backbone.transformer)))
    model, before = build_model(spec), []
    verdict = evaluate(model, one.conditions(), torch.float32, Tape(), before.append)
    kernels = Verdict(True, "the fused kernels are installed: 2.00 times as fast as the stock modules", 2.0)
    if one.backbone.family.sync_free is None:
        assert verdict[:4] == (*kernels[:3], False) and "waits for the device" in verdict.graphs_reason
    else:
        graphs = "rollouts are replayed as CUDA graphs: 1.50 times as fast as eager ones"
        assert verdict == kernels._replace(graphs=True, graphs_reason=graphs)
    assert [(one.fused, one.graphs) for one in before] == [(True, False)]
    assert not any(isinstance(getattr(module, "processor", None), FusedProcessor) for module in model.modules())


@pytest.mark.parametrize("case", [CASES[i] for i in HALF], ids=[NAMES[i] for i in HALF])
def test_half_precision_is_compared_with_half_precision(case, at_once):
    one = rollout_case(*case)
    assert evaluate(build_model(autotune.model_spec(one.backbone.transformer)), one.conditions(), torch.bfloat16).fused


@pytest.mark.parametrize("wrong", ["velocity", "gradient"])
def test_a_wrong_kernel_is_rejected(wrong, at_once, klein, monkeypatch):
    norm = functional.row_norm

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.001 if wrong == "velocity" else x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    monkeypatch.setattr(functional, "row_norm", lambda *args: tuple(Scaled.apply(out) for out in norm(*args)))
    verdict = evaluate(build_model(autotune.model_spec(klein[0])), klein[1], torch.float32)
    assert not verdict.fused and f"the fused kernels are wrong here (their {wrong} is" in verdict.reason


class Refused:
    """Captures nothing."""

    def __init__(self, error):
        self.error = error

    def capture(self, run):
        raise self.error


class Wrong(Tape):
    """Replays something else."""

    def capture(self, run):
        replay = super().capture(run)
        return lambda: replay() * 1.001


@pytest.mark.parametrize(
    ("graphs", "seconds", "words"),
    [
        (Tape(), [2.0, 1.99], "CUDA graphs are 1.01 times as fast here"),
        (Wrong(), [2.0, 1.0], "a CUDA graph is wrong here (its velocity is"),
        (Refused(NotCapturable("it waits")), [2.0, 1.0], "a forward cannot be captured, because it waits"),
        (Refused(RuntimeError("CUDA error\nmore")), [2.0, 1.0], "a forward cannot be captured, because CUDA error"),
    ],
)
def test_rollouts_stay_eager(graphs, seconds, words, at_once, klein, monkeypatch):
    """Where a graph is no faster, wrong, or cannot be captured; the kernels are judged for themselves."""
    monkeypatch.setattr(autotune, "_in_turn", lambda calls, device: seconds)
    verdict = evaluate(build_model(autotune.model_spec(klein[0])), klein[1], torch.float32, graphs)
    assert verdict.fused and not verdict.graphs and verdict.graphs_reason.startswith(f"eager rollouts: {words}")
    assert "more" not in verdict.graphs_reason


def test_a_process_that_graphs_end_has_judged_the_kernels(klein, monkeypatch, tmp_path):
    python = tmp_path / "python"
    judged = json.dumps([True, "the fused kernels are installed: 2.00 times as fast", 2.0])
    python.write_text(f"#!/bin/sh\necho '{judged}' > $3/verdict.json\nkill -SEGV $$\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    verdict, kept = run_trial(*klein)
    assert verdict.fused and kept and not verdict.graphs and verdict.graphs_reason.startswith("eager rollouts")


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_attention_are_the_whole_and_keep_no_scores(masked, monkeypatch):
    monkeypatch.setattr(autotune.ChunkedAttention, "ROWS", 5)
    q, k, v = (torch.randn(2, 3, 14, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = (torch.rand(2, 1, 1, 14) > 0.3) if masked else None
    found, kept = [], []
    for mode in (nullcontext(), autotune.ChunkedAttention()):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
        with mode, hooks:
            kept.clear()
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(map(torch.allclose, *found))
    assert max(kept, default=0) <= q.numel()  # no 14 x 14 scores of 6 heads


def test_the_exact_answer_of_a_trial_is_computed_in_chunks(klein, monkeypatch):
    calls = []
    chunks = autotune.ChunkedAttention.attention
    spy = lambda self, **how: calls.append(how["query"].dtype) or chunks(self, **how)  # noqa: E731
    monkeypatch.setattr(autotune.ChunkedAttention, "attention", spy)
    monkeypatch.setattr(autotune, "_seconds", lambda model, calls, device: [[1.0, 0.5], [2.0, 1.0]])
    assert evaluate(build_model(autotune.model_spec(klein[0])), klein[1], torch.float32).fused
    assert calls and set(calls) == {torch.float64}


def test_one_verdict_for_all_devices_of_a_kind(klein, monkeypatch, tmp_path):
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    files = set()
    for device in ("cuda:0", "cuda:1"):
        spec = autotune.model_spec(klein[0]) | {"device": device}
        monkeypatch.setattr(autotune, "model_spec", lambda transformer, spec=spec: dict(spec))
        files.add(verdict_file(*klein))
    assert len(files) == 1


def test_what_is_not_faster_is_not_installed(klein, monkeypatch):
    monkeypatch.setattr(autotune, "_seconds", lambda model, calls, device: [[1.0, 0.99], [2.0, 2.0]])
    verdict = evaluate(build_model(autotune.model_spec(klein[0])), klein[1], torch.float32)
    assert verdict == Verdict(False, "the stock modules stay: the fused kernels are 1.01 times as fast here", 12 / 11.9)


def test_a_trial_in_a_real_process(klein):
    """On a CPU both ways are plain torch, so the results are right and the speeds about the same."""
    verdict, keep = run_trial(*klein)
    assert keep and verdict.speedup is not None and 0.3 < verdict.speedup < 3 and "as fast" in verdict.reason


@pytest.mark.parametrize(
    ("script", "text", "keep"),
    [
        ("kill -SEGV $$", "Segmentation fault", True),
        ("kill -KILL $$", "Killed", False),  # the system's way to say that memory ran out
        ("echo 'torch.OutOfMemoryError: CUDA out of memory.' >&2; exit 1", "out of memory", False),
        ("echo 'CUDA error: an illegal memory access' >&2; exit 1", "illegal memory access", True),
        ("sleep 60", "took over 1 s", True),
    ],
)
def test_a_process_that_ends_badly_harms_nothing(klein, monkeypatch, tmp_path, script, text, keep):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(autotune, "TIMEOUT", 1.0 if "sleep" in script else 60.0)
    verdict, kept = run_trial(*klein)
    assert not verdict.fused and verdict.reason.startswith("the stock modules stay: ") and text in verdict.reason
    assert kept is keep


def test_a_trial_runs_once_and_its_verdict_is_kept(klein, monkeypatch, cuda):
    model, condition = klein
    lines, trials = [], []

    def process(transformer, condition):
        trials.append(len(condition))
        return Verdict(True, "the fused kernels are installed: 1.30 times as fast as the stock modules", 1.3), True

    monkeypatch.setattr(autotune, "run_trial", process)
    for _ in range(2):
        assert install_if_faster(model, condition, CUDA, lines.append).fused
        assert uninstall(model) > 0
    assert trials == [3] and cached_verdict(model, condition).speedup == 1.3
    assert install_if_faster(model, condition, CUDA, lines.append, graphs=True).fused and uninstall(model) > 0
    assert lines.pop() == "rollout.cuda_graphs: eager rollouts: CUDA graphs were not tested"
    first, *others = [line.split(":")[1] for line in lines[:-1]]
    assert first.startswith(" testing the fused kernels") and others == [" the fused kernels are installed"] * 2
    assert install_if_faster(model, condition.rows(slice(0, 2)), CUDA, lines.append) and trials == [3, 2]
    uninstall(model)


def test_every_source_below_the_package_belongs_to_a_verdict():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in source_files()}
    assert ROOT.name == "kernels" and folders == {".", "cuda", "cuda/csrc", "ops", "triton"}
    assert set(source_files()) >= set(ROOT.rglob("*.py")) | set(ROOT.rglob("*.cu")) | set(ROOT.rglob("*.cuh"))


SOURCES = ["functional.py", "cuda/launch.py", "cuda/csrc/rows.cuh", "ops/row_ops.py", "triton/qkv.py"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_changed_source_needs_another_trial(klein, monkeypatch, cuda, tmp_path, source):
    """A source in any sub-folder: no verdict about other kernels is used."""
    copy = tmp_path / "kernels_copy"
    shutil.copytree(ROOT, copy)
    monkeypatch.setattr(autotune, "ROOT", copy)
    before = verdict_file(*klein)
    assert verdict_file(*klein) == before
    with (copy / source).open("a") as file:
        file.write("\n")
    assert verdict_file(*klein) != before


def test_a_damaged_or_temporary_verdict_is_not_used(klein, monkeypatch, cuda):
    model, condition = klein
    temporary = Verdict(False, "the stock modules stay: out of memory"), False
    monkeypatch.setattr(autotune, "run_trial", lambda *_: temporary)
    assert install_if_faster(model, condition, CUDA, lambda line: None) == temporary[0]
    assert not list(cuda.rglob("trial-*.json")) and uninstall(model) == 0
    monkeypatch.setattr(autotune, "run_trial", lambda *_: (temporary[0], True))
    install_if_faster(model, condition, CUDA, lambda line: None)
    (file,) = cuda.rglob("trial-*.json")
    file.write_text("[tru")
    assert cached_verdict(model, condition) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_there_is_nothing_to_try_nothing_is_reported(klein, monkeypatch, device):
    """On a CPU, and on a GPU whose only backend is torch."""
    monkeypatch.setattr(backend, "active", lambda device: "torch")
    monkeypatch.setattr(subprocess, "run", None)
    lines = []
    assert install_if_faster(*klein, torch.device(device), lines.append) is None
    assert not lines and uninstall(klein[0]) == 0
