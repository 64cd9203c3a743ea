"""What a merge would take, before it takes it: every check, memory and time by part, no weight loaded.

Configurations and safetensors headers say all that is needed (`planning/`), for this machine or for a card that is not
here. Times divide FLOPs by the speed of a plain matrix product, so they are a lower bound.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from danceopd.common.cache import cache_folder
from danceopd.common.system import gigabytes, resolve_device
from danceopd.common.tensors import DTYPES
from danceopd.engine.teachers import TeacherWeights, check_teachers
from danceopd.errors import UserError
from danceopd.models.base import base_folder
from danceopd.planning.cards import Card, card_here, card_named
from danceopd.planning.checks import check_output
from danceopd.planning.memory import PHASES, memory, peak, student_numbers
from danceopd.planning.outline import Outline
from danceopd.planning.settings import prepare, unfit
from danceopd.planning.times import copies, drawing, measure, queries, update
from danceopd.recipe.recipe import AUTO, Recipe
from danceopd.run.directory import TEACHERS, check_directory
from danceopd.run.provenance import check_data, check_weights

ASSUMED = 100.0
"""TFLOP/s of a card of which only the memory is known."""
PNG_BYTES = 2.0
"""Bytes of a pixel of a PNG, about."""


def plan(recipe: Recipe, tflops: float | None = None, gpu: str | None = None) -> dict[str, Any]:
    """Facts of the merge that `recipe` describes, plain data: see `danceopd.cli.plan`.

    `tflops` is the speed to assume; None: the card's, or measured here for a second. `gpu` is a card that is not here
    ("24GB", "4090"). UserError for all that a merge would refuse, but for damaged numbers inside weight files; that
    there is no room is in `refused`.
    """
    if tflops is not None and not 0 < tflops < float("inf"):
        raise UserError(f"the speed is {tflops:g} TFLOP/s; give a number above 0, or leave it out to measure it")
    device = resolve_device(recipe.device if gpu is None else "cpu")
    card = card_here(device) if gpu is None else card_named(gpu)
    check_output(recipe.output)
    folder = base_folder(recipe.base)
    begun = (recipe.output / TEACHERS).is_file()
    teachers = check_teachers(recipe.teachers, folder, values=begun, fast=recipe.fast)
    prepared = prepare(recipe, folder, teachers, card, ended=False, room=False)
    recipe, run = prepared.recipe, prepared.run
    assert run is not None
    check_directory(recipe.output, recipe)
    if begun:
        check_weights(recipe.output, recipe, folder, teachers, record=False)
        check_data(recipe.output, recipe, run.datasets, record=False)
    found = queries(recipe, run)
    passes, flops = update(recipe, run, found)
    parts, notes = memory(recipe, run, card), [*prepared.said]
    if recipe.parallel == "fsdp":
        notes.append("planned for one process; with parallel: fsdp each of several holds its share of the base")
    speed = tflops or card.tflops
    if speed is None and gpu is None:
        speed = measure(device, dtype=DTYPES[recipe.dtype])
    elif speed is None:
        speed = ASSUMED
        notes.append(f"the speed of {card.name} is not known and taken as {ASSUMED:g} TFLOP/s; --tflops gives another")
    seconds = {part: flop / speed / 1e12 for part, flop in flops.items()}
    if copying := copies(recipe, run, passes):
        seconds["copies of the base"], passes["copies of the base"], flops["copies of the base"] = copying, 0.0, 0.0
    sources = drawing(recipe, run)
    sources["seconds"] = sources["flops"] / speed / 1e12
    shares = recipe.shares()
    disk = _disk(recipe, run)
    disk["run"] += int(PNG_BYTES * sources["pictures"] * run.call["height"] * run.call["width"])
    return {
        "base": str(recipe.base), "family": run.family.name, "transformer": type(run.transformer).__name__,
        "parameters": sum(p.numel() for p in run.transformer.parameters()), "dtype": _torch_name(recipe.dtype),
        "base_dtype": run.kept(recipe), "offload": recipe.offload,
        "device": card.name, "objective": recipe.objective, "steps": recipe.steps, "batch": recipe.batch,
        "settings": {key: recipe.value(key) for key in AUTO},
        "teachers": [
            {**_facts(one, run), "share": shares[one.teacher.name], "source": recipe.data_source(one.teacher),
             "columns": run.datasets[one.teacher.name].data.roles,
             "rows": len(run.datasets[one.teacher.name].data), "drawn": len(run.datasets[one.teacher.name].rows)}
            for one in teachers
        ],
        "student": {
            "rank": recipe.student.rank, "modules": len(run.modules),
            "parameters": student_numbers(recipe, run.modules),
        },
        "pictures": [picture.facts() for picture in run.pictures], "queries": found,
        "memory": [part.facts() for part in parts], "peak": {phase: peak(parts, phase) for phase in PHASES},
        "machine_memory": card.memory, "passes": passes, "flops": flops, "tflops": speed,
        "seconds": seconds, "sources": sources,
        "total_seconds": recipe.steps * sum(seconds.values()) + sources["seconds"],
        "disk": disk, "warnings": _warnings(recipe, run, card, disk, here=gpu is None), "notes": notes,
        "refused": run.refused or (None if recipe.parallel == "fsdp" else unfit(recipe, run, card)),
    }  # fmt: skip


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def _facts(weights: TeacherWeights, run: Outline) -> dict[str, Any]:
    """What one teacher is."""
    teacher, adapter = weights.teacher, run.adapters[weights.teacher.name]
    kind = "whole model" if weights.checkpoint is not None else weights.kind
    rank = 0 if adapter is None else teacher.rank if weights.checkpoint is not None else adapter.rank
    return {
        "name": teacher.name, "adapter": teacher.adapter, "guidance": teacher.guidance, "kind": kind, "rank": rank,
        "parameters": 0 if adapter is None else adapter.parameters,
    }  # fmt: skip


def _disk(recipe: Recipe, run: Outline) -> dict[str, int]:
    """Bytes: the run folder at its fullest, the cache at most (nothing of it encoded before), and what is free."""
    config: Any = run.transformer.config
    width = int(config.get("joint_attention_dim") or config.get("cap_feat_dim") or config.get("text_dim") or 0)
    channels = int(config.get("in_channels") or 64)
    rows = {
        (recipe.data_source(t), t.capability): len(a.rows) + sum(len(variant[1]) for variant in a.variants.values())
        for t in recipe.teachers
        for a in (run.datasets[t.name],)
    }
    cache, size = 0.0, DTYPES[recipe.dtype].itemsize
    for (_, capability), drawn in rows.items():
        for p in (p for p in run.pictures if p.capability == capability):
            cache += drawn * p.share * size * (p.tokens.text * width + p.tokens.source * channels)
    student = 4 * student_numbers(recipe, run.modules)
    return {
        "run": (recipe.keep_last + 1) * 4 * student + student, "run_free": _free(recipe.output),
        "cache": int(cache), "cache_free": _free(cache_folder()),
    }  # fmt: skip


def _free(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _warnings(recipe: Recipe, run: Outline, card: Card, disk: Mapping[str, int], here: bool) -> list[str]:
    warnings = []
    loaded = DTYPES[recipe.dtype].itemsize * sum(
        numbers for part, numbers in run.components.items() if part != "transformer" or run.stored_bytes is None
    ) + (run.stored_bytes or 0)
    memory_here = psutil.virtual_memory().total
    if card.cuda and here and loaded > memory_here:
        warnings.append(
            f"the base is loaded through the computer's memory, {gigabytes(loaded)}, which has {gigabytes(memory_here)}"
        )
    for part in ("run", "cache"):
        if disk[part] > disk[f"{part}_free"]:
            what = f"the run folder {recipe.output}" if part == "run" else "the cache (DANCEOPD_CACHE moves it)"
            free = gigabytes(disk[f"{part}_free"])
            warnings.append(f"{what} needs up to {gigabytes(disk[part])} and {free} are free")
    return warnings
