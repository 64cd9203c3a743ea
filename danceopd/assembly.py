"""The parts of a merge that are built from its recipe: backbone, teachers with their data, and the student's start.

`merge` calls each once, in its order. Nothing here trains or writes a student.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from danceopd.adapters.header import inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.common.shipped import SHIPPED
from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder
from danceopd.data.null_prompt import contrast_null, null_condition
from danceopd.engine.teachers import RoutedTeacher, TeacherWeights, load_teacher
from danceopd.engine.warm_start import StudentInit, student_init
from danceopd.kernels import install
from danceopd.labelfree.gates.variants import KEEP, unchanged
from danceopd.models.backbone import Backbone
from danceopd.models.base import empty_transformer
from danceopd.models.compile import compile_blocks
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe

_log = logging.getLogger("danceopd")


def build_backbone(recipe: Recipe, transformer: Any, family: Any) -> Backbone:
    """The transformer that carries all adapters, with checkpointing, kernels and compilation as the recipe says."""
    backbone = Backbone(transformer, family)
    if recipe.gradient_checkpointing:
        backbone.checkpoint_gradients()
    if recipe.kernels is True:
        install(transformer)
    if recipe.compile:
        compile_blocks(transformer)
    return backbone


def teacher_weights(recipe: Recipe, teacher: TeacherWeights, base: Path, device: torch.device) -> TeacherWeights:
    """Decide how a whole model is kept; where the student starts from it, its low-rank difference is needed."""
    wanted = recipe.student.init in ("blend", teacher.teacher.name)
    return load_teacher(teacher, base, recipe.output / "cache", device, wanted)


def initial_student(recipe: Recipe, teachers: list[TeacherWeights], base: Path) -> StudentInit:
    """What the student starts as, as `student.init` says."""
    adapters = {one.teacher.name: (one.adapter, one.teacher.scale) for one in teachers}
    student = recipe.student
    if student.init == "blend" and all(one.adapter is None for one in teachers):
        student = student.model_copy(update={"init": "base"})

    def read(path: str) -> tuple[Adapter, str]:
        return read_adapter(path, empty_transformer(base)), inspect_adapter(path).record.get("started", "a LoRA")

    init = student_init(student, adapters, read, recipe.seed, teachers[0].fast)
    _log.info(init.sentence)
    return init


def routed_teacher(
    recipe: Recipe, weights: TeacherWeights, data: TeacherData, encoder: Encoder, backbone: Backbone,
    fingerprint: str, device: torch.device,
) -> RoutedTeacher:  # fmt: skip
    """Put a teacher on the backbone and encode its rows, its null prompt, and the variants that gates need."""
    teacher, pipeline, null = weights.teacher, encoder.pipelines[weights.teacher.capability], None
    unconditional = recipe.guidance.unconditional > 0 or recipe.rollout.guidance != 1  # the student meets it, too
    contrast = recipe.contrast_of(teacher)
    if unconditional or (contrast is not None and contrast.reference == "null") or teacher.guidance is not None:
        null = null_condition(pipeline, teacher, fingerprint, recipe.output / "cache").to(device)
    field = weights.attach(backbone, null, recipe.rollout.merged and not recipe.compile)
    steps, variants = recipe.rollout.steps, dict(data.variants)
    dataset = encoder.encode(teacher.capability, data.data, data.rows, steps, targets=recipe.needs_targets)
    if null is None and recipe.gates.needs_null(teacher.capability):
        null = contrast_null(pipeline, teacher)
        if null is None:
            variants[KEEP] = unchanged(data.data, data.rows)
        else:
            null = null.to(device)
    encoded = {name: encoder.encode(teacher.capability, *variant, steps) for name, variant in variants.items()}
    return RoutedTeacher(teacher.name, field, dataset, null, encoded)


def warn_of_scenes(recipe: Recipe) -> None:
    """The built-in scenes suit the shipped base; another one deserves data of its own."""
    if recipe.resolved()["base"] in SHIPPED:
        return
    for key in sorted({t.capability for t in recipe.teachers if recipe.data_source(t).startswith("scenes")}):
        _log.warning(
            "data.%s is the built-in synthetic scenes (64-pixel shapes); name your own prompts or pairs for this base",
            key,
        )
