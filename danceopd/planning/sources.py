"""What `data: auto` has drawn before training: which pictures, by whom, and how many forwards that takes.

Sources of the bank's edits are drawn by the first teacher that draws, else by the base, as its stock pipeline would:
with the steps of `call`, and with the teacher's guidance or that pipeline's own. Only the sources of rows that the run
samples, or that are held out to measure it, are drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from danceopd.data.bank.rows import BankEdits, BankPrompts
from danceopd.data.dataset import TeacherData
from danceopd.models.base import pipeline_index
from danceopd.pipelines.family import Family
from danceopd.recipe.fast import few_step_name
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe


def drawer(teachers: Sequence[Teacher]) -> Teacher:
    """Who draws the sources: the first teacher of generation with an adapter, else the base."""
    drawing = [one for one in teachers if one.capability == "generation"]
    adapted = [one for one in drawing if one.adapter != "base"]
    bare = Teacher(name="base", adapter="base", capability="generation")
    return next(iter([*adapted, *drawing]), bare)


def guidance_of(recipe: Recipe, folder: Path, family: Family) -> float | None:
    """The classifier-free guidance with which sources are drawn; None: none."""
    who = drawer(recipe.teachers)
    if who.guidance is not None:
        return who.guidance
    few = recipe.fast is not None and recipe.fast.stacks
    few |= pipeline_index(folder).get("is_distilled") is True or few_step_name(recipe.base) is not None
    if few or family.guidance_on is None:
        return None
    import diffusers

    stock = inspect.signature(getattr(diffusers, family.generation, object).__call__).parameters
    for key, at_two in family.guidance_on(2.0).items():
        default = stock[key].default if key in stock else None
        if isinstance(at_two, int | float) and isinstance(default, int | float):
            scale = float(default) + 2.0 - at_two  # some pipelines count from 0
            return scale if scale > 1 else None
    return None


def wanted_sources(
    recipe: Recipe, datasets: Mapping[str, TeacherData], held_out: int | None = None
) -> dict[Path, str]:
    """The sources that a run reads, and the prompt of each; with `held_out`: of so many held-out edits of each teacher.
    """
    trains = held_out is None
    if held_out is None:
        probes = max(2, recipe.monitor.prompts // len(recipe.teachers)) if recipe.monitored_every else 0
        validated = recipe.validation.held_out_rows if recipe.validation.every else 0
        held_out = max(validated, probes, recipe.samples.count)
    found: dict[Path, str] = {}
    for one in datasets.values():
        if isinstance(one.data, BankEdits):
            found |= _drawn_from(one.data, one.rows if trains else [])
            if isinstance(held := one.data.held_out, BankEdits):
                found |= _drawn_from(held, range(min(held_out, len(held))))
    return found


def _drawn_from(data: BankEdits, rows: Sequence[int]) -> dict[Path, str]:
    return {Path(data[row][1]): data.drawn_from[row] for row in rows}


def about_bank(recipe: Recipe, datasets: Mapping[str, TeacherData]) -> list[str]:
    """What there is to say of data that is taken from the bank."""
    said = []
    for teacher in recipe.teachers:
        data = datasets[teacher.name].data
        if isinstance(data, BankPrompts):
            said.append(f"teacher {teacher.name}: data auto, {len(data):,} prompts that ship with danceopd")
        elif isinstance(data, BankEdits):
            sources = len(set(data.drawn_from))
            said.append(
                f"teacher {teacher.name}: data auto, {len(data):,} edits that ship with danceopd, of {sources:,} "
                f"pictures, which {_name(drawer(recipe.teachers))} draws before training"
            )
    return said


def _name(teacher: Teacher) -> str:
    return "the base" if teacher.adapter == "base" else f"teacher {teacher.name}"
