"""Memory that runs out: one sentence with what to change, the last step saved, and the same run goes on."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, check_student, run, tiny_recipe

from danceopd.common.system import out_of_memory
from danceopd.errors import UserError
from danceopd.merge import merge
from danceopd.planning.cards import card_here
from danceopd.recipe.recipe import Recipe
from danceopd.run.limits import memory_error

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("unable to mmap 40861047832 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:20] or "MemoryError",
)
def test_every_way_to_say_it_is_known(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError(str(error)))


def fail_after(monkeypatch, recipe: Recipe, step: int, error: Exception) -> str:
    """Merge; in the update after `step` the first forward with a gradient raises. What the user reads."""
    plain, steps = Flux2Transformer2DModel.forward, [0]

    def full(self, *given, **more):
        if torch.is_grad_enabled() and steps[-1] == step:
            raise error
        return plain(self, *given, **more)

    with monkeypatch.context() as context, pytest.raises(UserError) as caught:
        context.setattr(Flux2Transformer2DModel, "forward", full)
        merge(recipe, lambda metrics, total: steps.append(metrics.step))
    return str(caught.value)


def test_the_step_before_is_saved_and_the_advice_can_be_followed(models, tmp_path, monkeypatch):
    run(tiny_recipe(models, tmp_path / "whole", save_every=100))
    recipe = tiny_recipe(models, tmp_path / "run", save_every=100)
    said = fail_after(monkeypatch, recipe, 2, torch.OutOfMemoryError(CUDA))
    advice = ("micro_batch: 1", "gradient_checkpointing: true", "merged: false", "`danceopd plan`")
    assert all(part in said for part in ("Tried to allocate 2.00 GiB", *advice))
    assert said.count("\n") == 0 and "continue after step 2" in said
    less = {"micro_batch": 1, "gradient_checkpointing": True, "rollout": {"steps": 3, "merged": False}}
    smaller = tiny_recipe(models, tmp_path / "run", save_every=100, **less)
    assert run(smaller) == [3, 4]
    check_student(tmp_path / "run", load_file(tmp_path / "whole" / WEIGHTS))
    assert "micro_batch" not in str(memory_error(MemoryError(), smaller, None))


def test_nothing_is_saved_that_no_step_left(models, tmp_path, monkeypatch):
    """Before the first step, and where memory ran out among the weights that an update moves."""
    said = fail_after(monkeypatch, tiny_recipe(models, tmp_path / "run"), 0, MemoryError())
    assert "memory ran out (MemoryError)" in said and "run this again;" in said
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    calls, lerp = [], torch._foreach_lerp_

    def full(*given):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(CUDA)
        return lerp(*given)

    monkeypatch.setattr(torch, "_foreach_lerp_", full)
    with pytest.raises(UserError, match="continue after step 1"):  # another recipe is welcome: nothing was learnt
        run(tiny_recipe(models, tmp_path / "run", seed=1, save_every=1))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_on_a_gpu_fp32_is_multiplied_in_tf32(models, tmp_path, monkeypatch):
    found, before = [], torch.get_float32_matmul_precision()

    def stop(*given):
        found.append(torch.get_float32_matmul_precision())
        raise UserError("stop")

    monkeypatch.setattr(sys.modules["danceopd.merge"], "base_folder", stop)
    monkeypatch.setattr(sys.modules["danceopd.merge"], "card_here", lambda device: card_here(torch.device("cpu")))
    for device in map(torch.device, ("cuda", "cpu")):
        monkeypatch.setattr("danceopd.common.distributed.resolve_device", lambda name, device=device: device)
        with pytest.raises(UserError, match="stop"):
            run(tiny_recipe(models, tmp_path / "run"))
        assert torch.get_float32_matmul_precision() == before
    assert found == ["high", before]
