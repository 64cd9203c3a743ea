"""What the teachers are asked about, as conditions: encoded once by the stock pipeline, kept on disk.

Each teacher's prompts (or instructions with source images) become one `Condition` of many rows, written to the
run folder under a hash of everything it depends on; a continued run reads it back and needs no text encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from danceopd.data import edits_from, open_image, prompts_from
from danceopd.disk import disk_faults
from danceopd.pipelines.editing import EditingPipeline, editing_pipe
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import Condition
from danceopd.recipe import Recipe, Teacher
from danceopd.sample import call_defaults

FALLBACK = {"height": 1024, "width": 1024, "num_inference_steps": 50}
"""How a base without a `danceopd.json` is called: what FLUX.2 klein's own pipeline does."""


def call_of(base: Path, over: Mapping[str, int]) -> dict[str, Any]:
    """How the pipelines are called: the base's own settings, a recipe's over them. Guidance is off."""
    call = FALLBACK | call_defaults(base)
    call["steps"] = call.pop("num_inference_steps")
    call.pop("guidance_scale", None)
    return {**call, **over}


def drawers(pipe: Any, family: Family, call: dict[str, Any]) -> dict[str, GenerationPipeline]:
    """The generation and the editing pipeline of one base, by capability."""
    return {
        "generation": GenerationPipeline(pipe, family, call),
        "editing": EditingPipeline(editing_pipe(pipe), family, call),
    }


def conditions_of(
    recipe: Recipe, teacher: Teacher, drawer: GenerationPipeline, base_sha256: str, cache: Path
) -> Condition:
    """The conditions of one teacher's work, from ``cache`` when an equal set was encoded before."""
    source = recipe.work(teacher)
    facts = [source, _stamp(source), teacher.capability, recipe.data.rows, recipe.seed, base_sha256, drawer.call]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = cache / f"{teacher.capability}-{name}.safetensors"
    if path.exists():
        return Condition.from_state(load_file(path))
    if isinstance(drawer, EditingPipeline):
        pairs = edits_from(source, recipe.data.rows, recipe.seed)
        found = drawer.conditions([words for words, _ in pairs], [open_image(image) for _, image in pairs])
    else:
        found = drawer.conditions(prompts_from(source, recipe.data.rows, recipe.seed))
    partial = path.with_suffix(".partial")
    with disk_faults(path):
        cache.mkdir(parents=True, exist_ok=True)
        save_file(found.state(), partial)
        partial.replace(path)
    return found


def _stamp(source: str) -> object:
    """Size and time of a file, so that a changed one is encoded again; nothing for the exact world."""
    path = Path(source)
    if not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
