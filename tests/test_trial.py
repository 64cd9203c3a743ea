"""`kernels: auto`: the fused kernels are installed where a trial finds them right and faster, and nowhere else."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
import torch
from tinies import KLEIN
from walk_cases import CASES, NAMES, world

from danceopd.attention import choose, front, trial, uninstall
from danceopd.attention.processors import Fused
from danceopd.attention.trial import Verdict, install_where_better, judge, known, made, tried

CUDA = torch.device("cuda")
HALF = [i for i, name in enumerate(NAMES) if name in ("flux2-klein editing", "sd3 generation", "z-image editing")]


@pytest.fixture(scope="module")
def klein():
    one = world(KLEIN, "generation")
    return one.backbone.transformer, one.conditions()


@pytest.fixture
def at_once(monkeypatch):
    """The fused modules run as custom operators, and half as long as the stock ones."""
    monkeypatch.setattr(trial, "_seconds", lambda model, asked, device: [[2.0, 1.0], [4.0, 2.0]])
    with choose.using("op"):
        yield


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """As on a machine whose GPU can run the kernels, with a cache of its own."""
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path))
    monkeypatch.setattr(choose, "active", lambda device: device)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_family_is_judged(case, at_once):
    """Made anew from facts that JSON can hold, and asked what the merge asks."""
    one = world(*case)
    facts = json.loads(json.dumps(trial.facts_of(one.backbone.transformer)))
    model = made(facts)
    verdict = judge(model, one.conditions(), torch.float32)
    assert verdict == Verdict(True, "the fused ones run, 2.00 times as fast as the stock modules here", 2.0)
    assert not any(isinstance(getattr(module, "processor", None), Fused) for module in model.modules())


@pytest.mark.parametrize("case", [CASES[i] for i in HALF], ids=[NAMES[i] for i in HALF])
def test_half_precision_is_judged_by_half_precision(case, at_once):
    one = world(*case)
    assert judge(made(trial.facts_of(one.backbone.transformer)), one.conditions(), torch.bfloat16).fused


@pytest.mark.parametrize("wrong", ["velocity", "gradient"])
def test_a_wrong_kernel_is_found_out(wrong, at_once, klein, monkeypatch):
    norm = front.norm_site

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.001 if wrong == "velocity" else x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    monkeypatch.setattr(front, "norm_site", lambda *args: tuple(Scaled.apply(out) for out in norm(*args)))
    verdict = judge(made(trial.facts_of(klein[0])), klein[1], torch.float32)
    assert not verdict.fused and f"the fused ones are wrong here (their {wrong} is" in verdict.why


def test_what_is_not_faster_is_left_alone(klein, monkeypatch):
    monkeypatch.setattr(trial, "_seconds", lambda model, asked, device: [[1.0, 0.99], [2.0, 2.0]])
    verdict = judge(made(trial.facts_of(klein[0])), klein[1], torch.float32)
    assert verdict == Verdict(False, "the stock modules run: the fused ones are 1.01 times as fast here", 12 / 11.9)


def test_a_real_process_judges(klein):
    """On a CPU both ways are plain torch, so the answers are right and the speeds about the same."""
    verdict, keep = tried(*klein)
    assert keep and verdict.speed is not None and 0.3 < verdict.speed < 3 and "as fast" in verdict.why


@pytest.mark.parametrize(
    ("script", "said", "keep"),
    [
        ("kill -SEGV $$", "Segmentation fault", True),
        ("kill -KILL $$", "Killed", False),  # the system's way to say that memory ran out
        ("echo 'torch.OutOfMemoryError: CUDA out of memory.' >&2; exit 1", "out of memory", False),
        ("echo 'CUDA error: an illegal memory access' >&2; exit 1", "illegal memory access", True),
        ("sleep 60", "took over 1 s", True),
    ],
)
def test_a_process_that_ends_badly_harms_nothing(klein, monkeypatch, tmp_path, script, said, keep):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(trial, "LIMIT", 1.0 if "sleep" in script else 60.0)
    verdict, kept = tried(*klein)
    assert not verdict.fused and verdict.why.startswith("the stock modules run: ") and said in verdict.why
    assert kept is keep


def test_a_verdict_is_asked_for_once_and_kept(klein, monkeypatch, cuda):
    model, condition = klein
    said, asked = [], []

    def process(transformer, asked_about):
        asked.append(len(asked_about))
        return Verdict(True, "the fused ones run, 1.30 times as fast as the stock modules here", 1.3), True

    monkeypatch.setattr(trial, "tried", process)
    for _ in range(2):
        assert install_where_better(model, condition, CUDA, said.append).fused
        assert uninstall(model) > 0
    assert asked == [3] and known(model, condition).speed == 1.3
    trying, *runs = [line.split(",")[0] for line in said]
    assert trying == "kernels: trying the fused ones" and runs == ["kernels: the fused ones run"] * 2
    assert install_where_better(model, condition.rows(slice(0, 2)), CUDA, said.append) and asked == [3, 2]
    uninstall(model)


def test_a_damaged_or_passing_verdict_is_not_kept(klein, monkeypatch, cuda):
    model, condition = klein
    passing = Verdict(False, "the stock modules run: out of memory"), False
    monkeypatch.setattr(trial, "tried", lambda *_: passing)
    assert install_where_better(model, condition, CUDA, lambda line: None) == passing[0]
    assert not list(cuda.rglob("trial-*.json")) and uninstall(model) == 0
    monkeypatch.setattr(trial, "tried", lambda *_: (passing[0], True))
    install_where_better(model, condition, CUDA, lambda line: None)
    (place,) = cuda.rglob("trial-*.json")
    place.write_text("[tru")
    assert known(model, condition) is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_there_is_nothing_to_try_nobody_notices(klein, monkeypatch, device):
    """On a CPU, and on a GPU whose only backend is torch."""
    monkeypatch.setattr(choose, "active", lambda device: "torch")
    monkeypatch.setattr(subprocess, "run", None)
    said = []
    assert install_where_better(*klein, torch.device(device), said.append) is None
    assert not said and uninstall(klein[0]) == 0
