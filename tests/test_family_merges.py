"""`danceopd merge` from end to end for every family: two LoRA teachers, four steps, export, stock pipeline.

The base is a tiny pipeline of the real classes saved to disk. The pictures of the stock pipelines with the exported
LoRA must be those that our own rollout makes with the student's weights, and not the base's.
"""

from __future__ import annotations

import copy
import json
import math
from functools import wraps
from importlib import import_module

import pytest
import torch
from diffusers import Flux2KleinPipeline
from tinies import KLEIN, TINYS
from tiny import random_adapter, random_image
from tiny_merge import FAMILY_EDITS, FAMILY_PROMPTS, family_recipe, json_lines
from tiny_parts import load_lora, recorded_steps

import danceopd
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES


def write_paraphrases(folder):
    """The same data with paraphrases and longer captions, for what gates query under."""
    for name, prompts in {"generation": FAMILY_PROMPTS, "editing": FAMILY_EDITS}.items():
        lines = []
        for i, one in enumerate(prompts):
            row = {"prompt": one, "paraphrases": [f"please {one}", f"now {one}"], "expanded": f"{one} with care"}
            lines.append(json.dumps(row | ({"image": str(folder / f"{i}.png")} if name == "editing" else {})))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_all_gates_together_on_every_family(tiny, tmp_path, monkeypatch):
    """Every condition that a gate queries stacks, every contrast differs, and the metrics are numbers."""
    # a prompt hardly changes what random weights say
    monkeypatch.setattr("danceopd.labelfree.gates.evidence.FLOOR", 0.0)
    recipe = family_recipe(tiny, tiny.build(), tmp_path).resolved()
    write_paraphrases(tmp_path)
    recipe["data"]["generation"] = str(tmp_path / "generation.jsonl")
    if tiny.editing is not None:
        recipe["data"]["editing"] = str(tmp_path / "editing.jsonl")
    gates = {"evidence": True, "consensus": True, "skills": True, "group": 2}
    gated = danceopd.Recipe(**{**recipe, "gates": gates, "batch": 4, "steps": 3, "monitor": {"every": 0}})
    danceopd.merge(gated, report=lambda metrics, steps: None)
    lines = json_lines(tmp_path / "student" / "metrics.jsonl")
    seen = {key: line[key] for line in lines for key in line if key.startswith("gate/")}
    assert {"gate/weight", "gate/rho", "gate/leak", "gate/consensus", "gate/shift share", "gate/ess"} <= set(seen)
    assert all(isinstance(value, float) and math.isfinite(value) for value in seen.values()), seen
    assert seen["gate/leak"] > 0 and seen["gate/rho"] != 0


def test_a_merge_on_edits_of_several_sources(tmp_path, monkeypatch):
    """From the table to the student, with gates that read other sources; one too many is refused before a load."""
    monkeypatch.setattr("danceopd.labelfree.gates.evidence.FLOOR", 0.0)
    recipe = family_recipe(KLEIN, KLEIN.build(), tmp_path).resolved()
    random_image(9, 96, 64).save(tmp_path / "hat.png")
    lines = [json.dumps({"prompt": one, "image": [f"{i}.png", "hat.png"]}) for i, one in enumerate(FAMILY_EDITS)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    gates = {"evidence": True, "group": 2}
    found = danceopd.Recipe(**{**recipe, "gates": gates, "batch": 4, "steps": 2, "output": str(tmp_path / "gated")})
    seen, stock = [], Flux2KleinPipeline.__call__

    @wraps(stock)  # its signature is read
    def spy(self, **call):
        seen.append(call.get("image"))
        return stock(self, **call)

    monkeypatch.setattr(Flux2KleinPipeline, "__call__", spy)
    danceopd.merge(found, report=lambda metrics, steps: None)
    assert {len(image) for image in seen if isinstance(image, list)} == {2}  # a null prompt has one grey picture
    assert read_adapter(tmp_path / "gated").tensors and (tmp_path / "gated" / "samples").is_dir()
    (tmp_path / "edits.jsonl").write_text(json.dumps({"prompt": "join", "image": ["0.png"] * 11}) + "\n" + lines[0])
    monkeypatch.setattr(import_module("danceopd.assembly"), "load_base", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match="line 1 has 11 pictures, and Flux2KleinPipeline takes at most 10 pictures"):
        danceopd.merge(danceopd.Recipe(**{**recipe, "output": str(tmp_path / "no")}))


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_the_stock_pipelines_with_the_exported_lora_draw_what_the_student_draws(tiny, tmp_path):
    family, stock = FAMILIES[tiny.family], tiny.build()
    backbone = Backbone(copy.deepcopy(stock.transformer), family)
    other = "source" if tiny.editing is not None else "base"
    contrast = {"t0": {"reference": "prompt"}, "t1": {"reference": other, "mask": True}}
    recipe = family_recipe(tiny, stock, tmp_path).resolved() | {"contrast": contrast}  # moved targets on the way
    # and what many teachers may have: a trigger, the base on prompts without one, rows by need, a few-step LoRA
    recipe["teachers"][0]["trigger"] = "a star"
    recipe["teachers"].append({"name": "plain", "adapter": "base", "capability": tiny.tasks[0]})
    few = random_adapter(stock.transformer, rank=2, targets=family.lora_targets, seed=5, size=0.1)
    write_adapter(few, tmp_path / "few")
    recipe |= {"fast": {"steps": 2, "adapter": str(tmp_path / "few")}, "routing": {"per": "need"}}
    recipe |= {"validation": {"rows": 2, "every": 2}, "batch": 3, "student": {"rank": 12}}
    danceopd.merge(danceopd.Recipe(**recipe), report=lambda metrics, steps: None)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "`{prompt}, a star`" in card and "**2 steps**" in card
    backbone.add_adapter("student", read_adapter(tmp_path / "student"))
    fields = {"student": AdapterField(backbone, "student"), "base": BaseField(backbone)}
    load_lora(stock, tmp_path / "student")
    for task in tiny.tasks:
        call = {**tiny.call, "steps": 2}
        if task == "generation":
            ours = GenerationPipeline(stock, family, call)
            condition, inputs = ours.conditions(FAMILY_PROMPTS[:1]), {"prompt": FAMILY_PROMPTS[0]}
        else:
            ours = EditingPipeline(tiny.editing(stock), family, call)
            condition = ours.conditions(FAMILY_EDITS[:1], [random_image(0)])
            inputs = {"prompt": family.prompt(FAMILY_EDITS[0], True), "image": random_image(0)}
        call = {**tiny.call, **inputs, "num_inference_steps": call["steps"], "output_type": "latent"}
        del call["steps"]
        call = {**family.arguments(ours.pipe, call), **family.guidance_off}
        final = recorded_steps(ours.pipe, **call, generator=torch.Generator().manual_seed(3))[1][-1][2]
        for name, field in fields.items():
            *_, last = ours.denoise(condition, ours.noise([3]), field)
            error = float((last.x - final).abs().max() / final.abs().max())
            assert error < 10 * tiny.tolerance if name == "student" else error > 1e-2, (name, error)
