"""`draw_sources`: the sources of edits of `data: auto`, drawn before training by the model that is to be merged.

In: an opened run whose data is the prompt bank. Out: PNG files in its folder, `cache/sources`, with `sources.json`: who
drew them, from which prompts and seeds, and their hashes. What is there is kept, so a run that was stopped goes on
where it was, and a run that has all of them loads nothing here. The base is loaded, draws, and leaves memory again:
then the merge has it as if it were the first.
"""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from danceopd.assembly import open_base, place
from danceopd.common.files import disk_errors, sha256, write_atomic, write_json
from danceopd.data.bank.rows import NAME, seed_of
from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder, free_encoders, park_components
from danceopd.data.null_prompt import null_condition
from danceopd.data.sources import Prompts
from danceopd.data.tables import InMemoryTable
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, pipeline_call
from danceopd.models.fields import GuidedField, acting
from danceopd.pipelines.registry import family_of
from danceopd.planning.sources import drawer, guidance_of, wanted_sources
from danceopd.recipe.recipe import Recipe
from danceopd.run.heldout import by_layout

RECORD = "sources.json"
Report = Callable[[int, int, str], None]


def draw_sources(
    recipe: Recipe, base: Path, teachers: Sequence[TeacherWeights], datasets: Mapping[str, TeacherData],
    device: torch.device, report: Report, saved: str | None = None, sharded: bool = False, held_out: int | None = None,
) -> None:  # fmt: skip
    """Draw the sources that are wanted and not there; `report(done, total, note)` after each batch.

    With `held_out` only those of so many held-out edits of each teacher. UserError for a picture that is no longer what
    was drawn.
    """
    wanted = wanted_sources(recipe, datasets, held_out)
    if not wanted:
        return
    folder = next(iter(wanted)).parent
    if recipe.small_steps > 1:  # who draws needs more steps than the student
        steps = recipe.small_steps * recipe.call["num_inference_steps"]
        recipe = recipe.replaced({"call.num_inference_steps": steps})
    who, fingerprint = drawer(recipe.teachers), base_fingerprint(base, recipe.gguf)
    bare = TeacherWeights(who, fast=teachers[0].fast, stacks=teachers[0].stacks)
    weights = next((one for one in teachers if one.teacher.name == who.name), bare)
    family = family_of(base, recipe.family)
    guidance, call = guidance_of(recipe, base, family), pipeline_call(base, recipe.call, family)
    facts = {
        "base": fingerprint, "by": who.name, "sha256": weights.sha256, "scale": who.scale, "guidance": guidance,
        "negative": who.negative, "call": call, "dtype": recipe.dtype, "base_dtype": recipe.base_dtype,
        "seed": recipe.seed, "trigger": who.trigger,
    }  # fmt: skip
    if weights.stacks and weights.fast is not None:
        facts["fast"] = weights.fast.sha256
    drawn = _drawn(folder, facts)
    absent = [path for path in wanted if path.name not in drawn]
    if not absent:
        return
    report(len(wanted) - len(absent), len(wanted), "loading")

    recipe = recipe.replaced({"compile": False, "gradient_checkpointing": False} | ({"offload": "blocks"} if sharded
                             and device.type == "cuda" else {}))  # fmt: skip
    opened = open_base(recipe, base, saved, device, ["generation"])
    encoder = Encoder(base, family, opened.pipelines)
    pipeline, null = encoder.pipelines["generation"], None
    if guidance is not None:
        null = null_condition(pipeline, who, fingerprint, recipe.output / "cache").to(device)
    prompts = Prompts(InMemoryTable(NAME, [{"prompt": who.worded(wanted[path])} for path in absent]))
    seeds = [seed_of(wanted[path], recipe.seed) for path in absent]
    conditions = encoder.encode("generation", prompts, range(len(absent)), call["num_inference_steps"])
    free_encoders(encoder, opened.pipe)
    park_components(encoder)
    plain = replace(weights, teacher=who.model_copy(update={"guidance": None}))
    field = plain.attach(opened.backbone, None, recipe.rollout.merged is True)
    place(recipe, opened, device)
    if null is not None and guidance is not None:
        field = GuidedField(field, null, guidance)
    done = len(wanted) - len(absent)
    with acting(field):
        for rows in by_layout(conditions, range(len(absent))):
            for first in range(0, len(rows), recipe.rows_at_once):
                part = rows[first : first + recipe.rows_at_once]
                noise = pipeline.noise([seeds[row] for row in part]).to(device)
                *_, last = pipeline.denoise(conditions.rows(part).to(device), noise, field)
                if not last.x.isfinite().all():
                    raise UserError(f"{prompts[part[0]]!r} comes out as NaN in {recipe.dtype}; use dtype: bf16")
                for row, picture in zip(part, pipeline.images(last.x), strict=True):
                    file = io.BytesIO()
                    picture.convert("RGB").save(file, "PNG")  # a source has no alpha channel
                    with disk_errors(absent[row]):
                        write_atomic(absent[row], file.getvalue())
                    about = {"prompt": prompts[row], "seed": seeds[row], "sha256": sha256(absent[row])}
                    drawn[absent[row].name] = about
                write_json(folder / RECORD, {"drawn": facts, "pictures": drawn})
                done += len(part)
                report(done, len(wanted), "")
    del opened, encoder, pipeline, conditions, field, null, plain
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _drawn(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `sources.json` says of the pictures that are there; those of another drawer are deleted."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known, pictures = record["drawn"], dict(record["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        known, pictures = None, {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if known != json.loads(json.dumps(facts)):
            for name in pictures:
                (folder / name).unlink(missing_ok=True)
            return {}
        pictures = {name: about for name, about in pictures.items() if (folder / name).is_file()}
        for name, about in pictures.items():
            if sha256(folder / name) != about["sha256"]:
                raise UserError(f"{folder / name} is no longer what was drawn; delete it, and it is drawn again")
    return pictures
