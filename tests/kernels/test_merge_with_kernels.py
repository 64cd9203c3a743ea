"""`kernels: true` in a recipe: installed for the whole merge, and on a CPU the same student to the last bit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from tinies import KLEIN
from tiny_merge import family_recipe

import danceopd
from danceopd.adapters.read import read_adapter
from danceopd.kernels.autotune import Verdict


def student(folder, **fields):
    folder.mkdir()
    recipe = family_recipe(KLEIN, KLEIN.build(), folder).resolved()
    danceopd.merge(danceopd.Recipe(**{**recipe, **fields}), report=lambda done, steps: None)
    return read_adapter(folder / "student")


def test_the_same_student(tmp_path, monkeypatch):
    merge, installed = import_module("danceopd.assembly"), []
    install = merge.install
    monkeypatch.setattr(merge, "install", lambda model: installed.append(install(model)))
    plain = student(tmp_path / "plain")
    assert not installed
    fused = student(tmp_path / "fused", kernels=True)
    assert installed == [14]  # two double and two single blocks, their attention and their SwiGLUs
    assert plain.tensors.keys() == fused.tensors.keys()
    for path, pair in plain.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, fused.tensors[path])), path


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run the CUDA backend")
def test_what_cannot_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCEOPD_KERNELS", "cuda")
    with pytest.raises(danceopd.errors.UserError, match="DANCEOPD_KERNELS=cuda, but .*use auto"):
        student(tmp_path / "fused", kernels=True)


def test_a_trial_decides_unless_the_recipe_does(tmp_path, monkeypatch):
    """The trial gets rows of the merge's condition; `kernels` may change when a run is continued."""
    for value, text in (("on", "known: auto, true, false"), ("ato", "did you mean 'auto'"), ("true", "without quotes")):
        with pytest.raises(danceopd.errors.UserError, match=text):
            danceopd.Recipe(kernels=value)
    recipe = danceopd.Recipe()
    assert recipe.kernels == "auto" and "kernels" not in recipe.identity()
    trials = []

    def decide(transformer, condition, device, say, graphs):
        trials.append((len(condition), condition.family, device.type, graphs))
        return Verdict(False, "", graphs=True)

    def captured(field, device, enabled, **how):
        graphs.append(enabled)
        return field

    graphs = []
    monkeypatch.setattr(import_module("danceopd.merge"), "with_cuda_graphs", captured)

    monkeypatch.setattr(import_module("danceopd.merge"), "install_if_faster", decide)
    for name, fields in (
        ("auto", {}),
        ("off", {"kernels": False}),
        ("compiled", {"compile": True}),
        ("eager", {"rollout": {"steps": 4, "cuda_graphs": False}}),
        ("kernels off, graphs on", {"kernels": False, "rollout": {"steps": 4, "cuda_graphs": True}}),
        ("through LoRA layers", {"rollout": {"steps": 4, "merged": False}}),
    ):
        monkeypatch.setattr(import_module("danceopd.assembly"), "compile_blocks", lambda transformer: None)
        student(tmp_path / name, batch=3, **fields)
    tried = (2, "flux2-klein", "cpu")
    assert trials == [(*tried, True), (*tried, False), (*tried, False)]
    assert graphs == [True, False, False, False, True, False]


def test_the_command_says_how(danceopd):
    assert "kernels: true" in danceopd("kernels").stdout
