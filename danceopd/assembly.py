"""The parts of a merge that are built from its recipe: backbone, teachers with their data, and the student's start.

`merge` calls each once, in its order. Nothing here trains or writes a student.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from danceopd.adapters.blending.methods import method_of
from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.cache import cache_key
from danceopd.common.console import progress_bar
from danceopd.common.shipped import SHIPPED
from danceopd.common.tensors import DTYPES
from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder, open_pipelines
from danceopd.data.null_prompt import contrast_null, null_condition
from danceopd.engine.calibration.inputs import RecordedInputs
from danceopd.engine.calibration.states import Questions, spread
from danceopd.engine.teachers import RoutedTeacher, TeacherWeights, load_teacher
from danceopd.engine.warm_start import StudentInit, student_init
from danceopd.kernels import install
from danceopd.labelfree.gates.variants import KEEP, unchanged
from danceopd.models.backbone import Backbone
from danceopd.models.base import empty_transformer, load_base, pipeline_call
from danceopd.models.compile import compile_blocks
from danceopd.models.lora import Adapter
from danceopd.models.storage import computes_in, load_gguf, offload, quantise
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import empty_module
from danceopd.pipelines.registry import family_of
from danceopd.pipelines.two_transformers import SECOND
from danceopd.recipe.recipe import Recipe
from danceopd.run.export import stock_dtype

_log = logging.getLogger("danceopd")


@dataclass(frozen=True, eq=False)
class OpenedBase:
    """A loaded base: its stock pipeline (whose transformer records calls and has no weights), the transformer, still on
    the CPU, the backbone around it, and the pipelines of each capability."""

    pipe: Any
    transformer: Any
    family: Family
    call: dict[str, Any]
    pipelines: dict[str, GenerationPipeline]
    backbone: Backbone


def open_base(
    recipe: Recipe, base: Path, saved: str | None, device: torch.device, capabilities: Sequence[str]
) -> OpenedBase:
    """Load the base with its encoders, which are on the device; the transformer waits on the CPU until they have left.

    `saved` is the kind in which the base was saved quantised (None: it was not).
    """
    dtype = DTYPES[recipe.dtype]
    parts = load_gguf(recipe.gguf, base, dtype)
    pipe = load_base(base, dtype if saved else stock_dtype(recipe.dtype), **parts)
    transformer = computes_in(pipe.transformer, dtype)
    pipe.transformer = empty_module(transformer, torch.empty(0, dtype=dtype))  # pipelines only record calls
    if hasattr(transformer, SECOND):
        pipe.transformer_2 = None  # of which they record the first one's
    pipe.to(device)
    family = family_of(pipe, recipe.family)
    call = pipeline_call(base, recipe.call, family)
    pipelines = open_pipelines(pipe, family, call, capabilities, recipe.editing_base)
    return OpenedBase(pipe, transformer, family, call, pipelines, build_backbone(recipe, transformer, family))


def place(recipe: Recipe, opened: OpenedBase, device: torch.device) -> str | None:
    """Put the transformer on the device, quantised or block by block as the recipe says; what there is to say of it."""
    if recipe.offload == "blocks":
        return offload(opened.backbone, device)
    said = None
    if recipe.base_dtype not in (None, "gguf"):
        said = quantise(opened.transformer, recipe.base_dtype, DTYPES[recipe.dtype], device)
    opened.transformer.to(device)
    return said


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


def recorded_start(
    recipe: Recipe, init: StudentInit, weights: Sequence[TeacherWeights], teachers: Sequence[RoutedTeacher],
    rows: Mapping[str, Sequence[int]], backbone: Backbone,
) -> StudentInit:  # fmt: skip
    """A `pending` start: inputs of layers are recorded on a few of each teacher's `rows`, and it is made of them.

    It is kept in the run folder's cache, for the run's continuation and its other processes.
    """
    if not init.pending:
        return init
    adapters = {one.teacher.name: (one.adapter, one.teacher.scale) for one in weights}
    facts = [[one.sha256, one.teacher.scale, one.teacher.guidance, one.residual] for one in weights]
    key = cache_key(recipe.student.model_dump(mode="json"), facts, recipe.rollout.steps, recipe.seed)
    folder = recipe.output / "cache" / f"start-{key[:16]}"
    if (folder / WEIGHTS).is_file():
        record = inspect_adapter(folder).record
        return StudentInit(read_adapter(folder), float(record["residual"]), str(record["started"]))
    count = method_of(recipe.student.init_method).prompts
    questions = [Questions(t.dataset, spread(rows[t.name], count), t.field) for t in teachers]
    device = next(backbone.transformer.parameters()).device if backbone.device is None else backbone.device
    with progress_bar("recording the start's inputs") as report, RecordedInputs(
        backbone, questions, device, recipe.seed, recipe.rows_at_once, report
    ) as inputs:
        found = student_init(recipe.student, adapters, _no_file, recipe.seed, inputs=inputs)
    assert found.adapter is not None
    write_adapter(found.adapter, folder, metadata={"residual": repr(found.residual), "started": found.sentence})
    _log.info(found.sentence)
    return found


def _no_file(path: str) -> tuple[Adapter, str]:
    raise ValueError("a blend reads no file")


def routed_teacher(
    recipe: Recipe, weights: TeacherWeights, data: TeacherData, encoder: Encoder, backbone: Backbone,
    fingerprint: str, device: torch.device,
) -> RoutedTeacher:  # fmt: skip
    """Put a teacher on the backbone and encode its rows, its null prompt, and the variants that gates need."""
    teacher, pipeline, null = weights.teacher, encoder.pipelines[weights.teacher.capability], None
    unconditional = recipe.guidance.unconditional > 0 or recipe.rollout.guidance != 1  # the student meets it, too
    unconditional = unconditional or "guided" in recipe.nft.contexts
    contrast = recipe.contrast_of(teacher)
    if unconditional or (contrast is not None and contrast.reference == "null") or teacher.guidance is not None:
        null = null_condition(pipeline, teacher, fingerprint, recipe.output / "cache").to(device)
    merged, weaker = recipe.rollout.merged and not recipe.compile, None
    field = weights.attach(backbone, null, merged)
    if contrast is not None and contrast.reference == "weaker":
        weaker = weights.weaker(contrast.strength).attach(backbone, None, merged)
    steps, variants = recipe.rollout.steps, dict(data.variants)
    dataset = encoder.encode(teacher.capability, data.data, data.rows, steps, targets=recipe.needs_targets)
    if null is None and recipe.gates.needs_null(teacher.capability):
        null = contrast_null(pipeline, teacher)
        if null is None:
            variants[KEEP] = unchanged(data.data, data.rows)
        else:
            null = null.to(device)
    encoded = {name: encoder.encode(teacher.capability, *variant, steps) for name, variant in variants.items()}
    return RoutedTeacher(teacher.name, field, dataset, null, encoded, weaker)


def warn_of_scenes(recipe: Recipe) -> None:
    """The built-in scenes suit the shipped base; another one deserves data of its own."""
    if recipe.resolved()["base"] in SHIPPED:
        return
    for key in sorted({t.capability for t in recipe.teachers if recipe.data_source(t).startswith("scenes")}):
        _log.warning(
            "data.%s is the built-in synthetic scenes (64-pixel shapes); name your own prompts or pairs for this base",
            key,
        )
