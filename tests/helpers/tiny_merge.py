"""Merges on tiny pipelines: files of a base and its teachers, small recipes, runs that are killed or launched twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from program import free_port
from safetensors.torch import load_file
from tiny import random_adapter, random_image, tiny_klein
from tiny_parts import Tiny

from danceopd.adapters.write import write_adapter
from danceopd.merge import merge
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.recipe import Recipe

WEIGHTS = "pytorch_lora_weights.safetensors"
FAMILY_PROMPTS = ["a red circle", "two blue square", "a white ring above"]
FAMILY_EDITS = ["make it red", "remove the star", "add a ring"]


def tiny_models(folder: Path) -> Path:
    """`base`, a tiny FLUX.2 klein, and two random LoRAs of it, `draws` and `edits`."""
    pipe = tiny_klein(folder / "base")
    for i, name in enumerate(("draws", "edits")):
        write_adapter(random_adapter(pipe.transformer, seed=i, size=0.1), folder / name)
    return folder


def tiny_recipe(models: Path, output: Path, **fields: Any) -> Recipe:
    """A merge of `tiny_models` into a student of rank 8, four rows an update."""
    given = {
        "base": str(models / "base"),
        "generation": str(models / "draws"),
        "editing": str(models / "edits"),
        "output": output,
        "steps": 4,
        "batch": 4,
        "student": {"rank": 8},
        "data": {"rows": 6},
        "samples": {"every": 0, "count": 1},
        "validation": {"rows": 2},  # of 32 rows, it would take most of a run's time
        "monitor": {"prompts": 8, "seeds": 2},  # where it is on; 64 of 4 would take most of a run's time too
        "save_every": 2,
        "rollout": {"steps": 3},
        "call": {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 24},
    }
    return Recipe(**{**given, **fields})


class Killed(Exception):
    """Ends a merge in the middle, as a kill would."""


def run(recipe: Recipe, kill: int | None = None) -> list[int]:
    """Merge; the steps that were reported. `kill` ends it after that update."""
    steps: list[int] = []

    def report(metrics: Any, total: int) -> None:
        steps.append(metrics.step)
        if metrics.step == kill:
            raise Killed

    if kill is None:
        merge(recipe, report)
    else:
        with pytest.raises(Killed):
            merge(recipe, report)
    return steps


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- several processes ------------------------------------------------------------------------------------


def three_rows(models: Path, output: Path, **fields: Any) -> Recipe:
    """Three rows an update, so that one process has two and the other one; constant rate, so that it can go on."""
    given = {
        "steps": 24, "batch": 3, "data": {"rows": 4}, "optimizer": {"warmup": 1},
        "call": {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 24},
    }  # fmt: skip
    return tiny_recipe(models, output, **{**given, **fields})


def two_processes(recipe: Recipe, folder: Path, fails: bool = False) -> str:
    """`danceopd merge` in two real processes that are told what torchrun tells; what they said."""
    file, port = folder / "r.yaml", free_port()
    file.write_text(recipe.to_yaml())
    both = [program.start("merge", file, **program.environment_of(rank, 2, port)) for rank in (0, 1)]
    statuses, said = [process.wait() for process in both], "".join(p.stderr + p.stdout for p in both)
    assert any(statuses) == fails, said[-4000:]
    return said


def check_student(output: Path, wanted: dict[str, torch.Tensor]) -> None:
    """The exported student has these tensors, but for rounding."""
    found = load_file(output / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


# -- every family -----------------------------------------------------------------------------------------


def family_recipe(tiny: Tiny, pipe: Any, folder: Path) -> Recipe:
    """The base, two adapters and their data as files in `folder`, and the recipe of their merge."""
    pipe.save_pretrained(folder / "base")
    teachers = []
    for i, task in enumerate((*tiny.tasks, *tiny.tasks)[:2]):
        targets = FAMILIES[tiny.family].lora_targets
        write_adapter(random_adapter(pipe.transformer, targets=targets, seed=i, size=0.1), folder / f"teacher{i}")
        teachers.append({"name": f"t{i}", "adapter": str(folder / f"teacher{i}"), "capability": task})
    (folder / "prompts.txt").write_text("\n".join(FAMILY_PROMPTS))
    fields: dict[str, Any] = {"base": str(folder / "base"), "data": {"generation": str(folder / "prompts.txt")}}
    if tiny.editing is not None:
        lines = []
        for i, instruction in enumerate(FAMILY_EDITS):
            random_image(i).save(folder / f"{i}.png")
            lines.append(json.dumps({"prompt": instruction, "image": f"{i}.png"}))
        (folder / "edits.jsonl").write_text("\n".join(lines))
        fields["data"]["editing"] = str(folder / "edits.jsonl")
    if tiny.components is not None:
        tiny.components(folder / "components")
        fields["editing_base"] = str(folder / "components")
    call = {key: value for key, value in tiny.call.items() if key != "steps"}
    return Recipe(
        **fields,
        teachers=teachers,
        output=folder / "student",
        steps=4,
        batch=2,
        device="cpu",
        call={**call, "num_inference_steps": 2},
        student={"rank": 8},
        rollout={"steps": 2},
        samples={"every": 0, "count": 1},
        validation={"rows": 2},
    )
