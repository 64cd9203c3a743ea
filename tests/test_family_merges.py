"""`danceopd merge` from end to end for every family: two LoRA teachers, four steps, export, stock pipeline.

The base is a tiny pipeline of the real classes saved to disk. The pictures of the stock pipelines with the exported
LoRA must be those that our own rollout draws with the student's weights, and not the base's.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tinies import TINIES
from tiny import random_adapter, random_image
from tiny_parts import recorded_steps

import danceopd
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

WORDS = ["a red circle", "two blue square", "a white ring above"]
EDITS = ["make it red", "remove the star", "add a ring"]


def recipe_of(tiny, pipe, folder):
    """The base, two adapters and the work as files, and the recipe of their merge."""
    pipe.save_pretrained(folder / "base")
    teachers = []
    for i, task in enumerate((*tiny.tasks, *tiny.tasks)[:2]):
        targets = FAMILIES[tiny.family].lora_targets
        write_adapter(random_adapter(pipe.transformer, targets=targets, seed=i, size=0.1), folder / f"teacher{i}")
        teachers.append({"name": f"t{i}", "adapter": str(folder / f"teacher{i}"), "capability": task})
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    fields = {"base": str(folder / "base"), "data": {"generation": str(folder / "prompts.txt")}}
    if tiny.editing is not None:
        lines = []
        for i, words in enumerate(EDITS):
            random_image(i).save(folder / f"{i}.png")
            lines.append(json.dumps({"prompt": words, "image": f"{i}.png"}))
        (folder / "edits.jsonl").write_text("\n".join(lines))
        fields["data"]["editing"] = str(folder / "edits.jsonl")
    if tiny.components is not None:
        tiny.components(folder / "components")
        fields["editing_base"] = str(folder / "components")
    return danceopd.Recipe(
        **fields,
        teachers=teachers,
        output=folder / "student",
        steps=4,
        batch=2,
        device="cpu",
        call={**tiny.call, "steps": 2},
        student={"rank": 8},
        rollout={"steps": 2},
        samples={"every": 0, "count": 1},
    )


def said_otherwise(folder):
    """The same work with other wordings and longer ones, for what gates ask."""
    for name, words in {"generation": WORDS, "editing": EDITS}.items():
        lines = []
        for i, one in enumerate(words):
            row = {"prompt": one, "paraphrases": [f"please {one}", f"now {one}"], "expanded": f"{one} with care"}
            lines.append(json.dumps(row | ({"image": str(folder / f"{i}.png")} if name == "editing" else {})))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.family)
def test_all_gates_together_on_every_family(tiny, tmp_path, monkeypatch):
    """Every condition that a gate asks stacks, every contrast differs, and the figures are numbers."""
    monkeypatch.setattr("danceopd.labelfree.evidence.FLOOR", 0.0)  # random weights hardly hear a prompt
    recipe = recipe_of(tiny, tiny.build(), tmp_path).resolved()
    said_otherwise(tmp_path)
    recipe["data"]["generation"] = str(tmp_path / "generation.jsonl")
    if tiny.editing is not None:
        recipe["data"]["editing"] = str(tmp_path / "editing.jsonl")
    gates = {"evidence": True, "consensus": True, "skills": True, "group": 2}
    gated = danceopd.Recipe(**{**recipe, "gates": gates, "batch": 4, "steps": 3, "watch": {"every": 0}})
    danceopd.merge(gated, report=lambda done, steps: None)
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    seen = {key: line[key] for line in lines for key in line if key.startswith("gate/")}
    assert {"gate/weight", "gate/rho", "gate/leak", "gate/consensus", "gate/shift share", "gate/ess"} <= set(seen)
    assert all(isinstance(value, float) and math.isfinite(value) for value in seen.values()), seen
    assert seen["gate/leak"] > 0 and seen["gate/rho"] != 0


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.family)
def test_the_stock_pipelines_with_the_exported_lora_draw_what_the_student_draws(tiny, tmp_path):
    family, stock = FAMILIES[tiny.family], tiny.build()
    backbone = Backbone(copy.deepcopy(stock.transformer), family)
    danceopd.merge(recipe_of(tiny, stock, tmp_path), report=lambda done, steps: None)
    backbone.add_adapter("student", read_adapter(tmp_path / "student"))
    fields = {"student": AdapterField(backbone, "student"), "base": BaseField(backbone)}
    stock.load_lora_weights(tmp_path / "student")
    for task in tiny.tasks:
        call = {**tiny.call, "steps": 2}
        if task == "generation":
            ours = GenerationPipeline(stock, family, call)
            condition, asked = ours.conditions(WORDS[:1]), {"prompt": WORDS[0]}
        else:
            ours = EditingPipeline(tiny.editing(stock), family, call)
            condition = ours.conditions(EDITS[:1], [random_image(0)])
            asked = {"prompt": EDITS[0], "image": random_image(0)}
        call = {**tiny.call, **asked, "num_inference_steps": call["steps"], "output_type": "latent"}
        del call["steps"]
        call |= {**family.extra(ours.pipe, call), **family.guidance_off}
        final = recorded_steps(ours.pipe, **call, generator=torch.Generator().manual_seed(3))[1][-1][2]
        for name, field in fields.items():
            *_, last = ours.denoise(condition, ours.noise([3]), field)
            error = float((last.x - final).abs().max() / final.abs().max())
            assert error < 10 * tiny.tolerance if name == "student" else error > 1e-2, (name, error)
