"""What a run holds while it draws, validates and exports: one copy of the base, few rows, nothing of training."""

from __future__ import annotations

import gc
import weakref

import pytest
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from tiny_merge import WEIGHTS, run, tiny_recipe

from danceopd.adapters.load import ExportError
from danceopd.engine.trainer import Trainer
from danceopd.kernels.processors import FusedProcessor
from danceopd.models.backbone import Backbone
from danceopd.models.lora import LoraLinear


def test_while_it_is_proven_there_are_the_base_and_the_file(models, tmp_path, monkeypatch):
    """The run's own transformer, stock again, without a copy of it; nothing of training; one row a forward."""
    held, alive, kinds, rows = [], [], [], []
    stock = {
        "load": Flux2KleinPipeline.load_lora_weights, "release": Trainer.release,
        "forward": Flux2Transformer2DModel.forward,
    }  # fmt: skip

    def release(self):
        backbone, adamw = self.backbone, self.optimizer.adamw
        moments = [tensor for state in adamw.state.values() for tensor in state.values()]
        adapters = [half for name in backbone.adapters for half in backbone.parameters(name)]
        for tensors in (self.optimizer.ema, moments, adapters, list(backbone._merged.values())):
            assert tensors
            held.extend(map(weakref.ref, tensors))
        stock["release"](self)

    def load(self, *given, **more):
        gc.collect()
        alive.append(sum(one() is not None for one in held))
        kinds.extend(type(module) for module in self.transformer.modules())
        kinds.extend(type(getattr(module, "processor", None)) for module in self.transformer.modules())
        assert self.transformer._compiled_call_impl is None
        return stock["load"](self, *given, **more)

    def forward(self, hidden_states, *given, **more):
        rows.append(len(hidden_states))
        return stock["forward"](self, hidden_states, *given, **more)

    monkeypatch.setattr(Trainer, "release", release)
    monkeypatch.setattr(Flux2KleinPipeline, "load_lora_weights", load)
    monkeypatch.setattr(Flux2Transformer2DModel, "forward", forward)
    settings = {"micro_batch": 1, "samples": {"every": 2, "count": 3}, "kernels": True, "gradient_checkpointing": True}
    run(tiny_recipe(models, tmp_path / "run", **settings))
    assert len(held) > 200 and alive == [0]
    assert not {LoraLinear, FusedProcessor} & set(kinds) and max(rows) == 1


def test_one_base_is_loaded_and_without_merged_rollouts_none_is_copied(models, tmp_path, monkeypatch):
    loads, stock = [], DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(*given, **more):
        loads.append(1)
        return stock(*given, **more)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(Backbone, "refresh", lambda *given: pytest.fail("weights were merged"))
    checks = {"monitor": {"every": 2, "prompts": 8, "seeds": 2}, "validation": {"every": 2, "rows": 2}}
    run(tiny_recipe(models, tmp_path / "run", steps=2, rollout={"steps": 2, "merged": False}, **checks))
    assert len(loads) == 1


def test_a_base_that_training_changed_proves_nothing(models, tmp_path, monkeypatch):
    release = Trainer.release

    def broken(self):
        release(self)
        self.backbone.transformer.x_embedder.weight.data[0, 0] += 1

    monkeypatch.setattr(Trainer, "release", broken)
    with pytest.raises(ExportError, match=r"x_embedder\.weight of the base is not what .*base holds"):
        run(tiny_recipe(models, tmp_path / "run", steps=1))
    assert not (tmp_path / "run" / WEIGHTS).exists()
