"""Teachers of every kind on one backbone: from a recipe's teacher to the velocity field that is queried.

`check_teachers` reads LoRAs and the headers of whole models, and refuses all that can be refused before the base is
loaded; `load_teacher` decides how a whole model is kept (as its low-rank difference from the base where that loses
less than the recipe's `residual`, else streamed block by block, so that no second model is resident);
`TeacherWeights.attach` puts it on the backbone. A plug-in may answer in its place (`own_field`), and any teacher may be
guided (classifier-free).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd.adapters.blend import blend, scaled
from danceopd.adapters.extract import difference
from danceopd.adapters.header import WEIGHTS, inspect_adapter, is_checkpoint
from danceopd.adapters.read import adapter_shapes, read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.cache import cache_key
from danceopd.common.console import progress_bar
from danceopd.data.dataset import Dataset
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_fingerprints, empty_transformer
from danceopd.models.checkpoint import Checkpoint, component_difference, open_checkpoint, scheduler_difference
from danceopd.models.fields import AdapterField, GuidedField, MergedField, VelocityField
from danceopd.models.lora import Adapter
from danceopd.models.streamed import StreamedField
from danceopd.pipelines.condition import Condition
from danceopd.plugins import check_made, check_options, load
from danceopd.recipe.fast import Fast
from danceopd.recipe.parts import Teacher

_log = logging.getLogger("danceopd")


@dataclass(frozen=True, eq=False)
class TeacherWeights:
    """A teacher whose files were checked. `adapter` is a LoRA as read, or a whole model's low-rank difference;
    `checkpoint` the whole model; `residual` what the difference loses of it; `streamed` whether it is run whole."""

    teacher: Teacher
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None
    residual: float | None = None
    streamed: bool = False
    fast: Adapter | None = None  # the student's step-distilled LoRA, at its strength
    stacks: bool = False  # whether this teacher is asked with it on top

    @property
    def kind(self) -> str:
        """"base", "lora", "low-rank" or "streamed"."""
        if self.checkpoint is not None:
            return "streamed" if self.streamed else "low-rank"
        return "base" if self.adapter is None else "lora"

    @property
    def sha256(self) -> str | None:
        """Of its weights; None for the bare base."""
        if self.checkpoint is not None:
            return self.checkpoint.sha256
        return None if self.adapter is None else self.adapter.sha256

    def weaker(self, strength: float) -> TeacherWeights:
        """The same teacher at `strength` of its scale, without guidance, under a name of its own."""
        teacher = self.teacher
        changed = {"name": f"{teacher.name}-weaker", "scale": teacher.scale * strength, "guidance": None}
        return replace(self, teacher=teacher.model_copy(update=changed))

    def attach(self, backbone: Backbone, null: Condition | None = None, merged: bool = True) -> VelocityField:
        """Add its adapter to the backbone under the teacher's name; returns its velocity field. `null` guides it.

        `merged`: the adapter may be merged into the weights where that is cheaper, and exact. Call it once.
        """
        teacher = self.teacher
        field: VelocityField
        if self.streamed:
            assert self.checkpoint is not None
            field = StreamedField(backbone, self.checkpoint, teacher.scale)
        else:
            adapter, scale = self.adapter, teacher.scale
            if self.stacks and self.fast is not None:  # the sum of both, exactly
                pairs = [self.fast] if adapter is None else [scaled(adapter, scale), self.fast]
                adapter, scale = blend(pairs, [1.0] * len(pairs)), 1.0
            if adapter is not None:
                backbone.add_adapter(teacher.name, adapter, scale)
            name = None if adapter is None else teacher.name
            cheaper = merged and name is not None and backbone.merging_is_cheaper(name)
            field = MergedField(backbone, teacher.name) if cheaper else AdapterField(backbone, name)
        if teacher.field is not None:
            field = own_field(teacher.field, field, teacher.field_options)
        if teacher.guidance is None:
            return field
        if null is None:
            raise ValueError(f"teacher {teacher.name!r} is guided and has no null condition")
        return GuidedField(field, null, teacher.guidance)


@dataclass(frozen=True)
class OwnField:
    """A teacher's velocity from a plug-in, which may ask the teacher's weights. Guidance stands around it."""

    name: str
    field: VelocityField

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity = self.field(x, sigma, condition)
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            what = f"shape {tuple(velocity.shape)}" if isinstance(velocity, Tensor) else f"a {type(velocity).__name__}"
            raise UserError(f"teacher field {self.name} gave {what}; let it give a velocity of x's, {tuple(x.shape)}")
        return velocity.to(x.device, torch.float32)


def own_field(name: str, field: VelocityField, options: Mapping[str, Any]) -> VelocityField:
    """The field that a plug-in makes of a teacher's own; UserError where it makes none."""
    function = load("teacher field", name)
    check_options("teacher field", name, function, options)
    made = function(field, **options)
    check_made("teacher field", name, made, callable(made))
    return OwnField(name, made)


def check_teachers(
    teachers: Iterable[Teacher], base: Path, values: bool = True, fast: Fast | None = None
) -> list[TeacherWeights]:
    """The weights of a recipe's teachers, in order; whole models are opened, not loaded.

    Without `values` adapters are read by their headers alone and lie on the meta device. `fast` is the recipe's, whose
    adapter each of them gets.

    UserError for a teacher that is no match for `base` (a pipeline folder): another architecture, other tensors,
    a LoRA recorded for another base, a pipeline with another scheduler, or the base itself as a whole model.
    """
    found = [_check(teacher, base, values) for teacher in teachers]
    if fast is None or fast.adapter is None:
        return found
    if is_checkpoint(fast.adapter):
        raise UserError(
            f"fast.adapter {fast.adapter} is a whole model; make it the base, or a LoRA of the base by `danceopd "
            "extract`"
        )
    asked = Teacher(name="fast", adapter=fast.adapter, capability="generation", accept=fast.accept)
    try:
        few = _check(asked, base, values).adapter
    except UserError as error:
        said = str(error).replace("teacher 'fast'", "fast.adapter").replace("on the teacher", "in fast")
        raise UserError(said) from None
    assert few is not None
    return [replace(one, fast=scaled(few, fast.scale), stacks=fast.stacks) for one in found]


def _check(teacher: Teacher, base: Path, values: bool) -> TeacherWeights:
    if teacher.adapter == "base":
        return TeacherWeights(teacher)
    if not is_checkpoint(teacher.adapter):
        recorded = inspect_adapter(teacher.adapter).record.get("base_sha256")
        if "base" in teacher.accept:
            recorded = None
        mine = base_fingerprints(base) if recorded else set()  # it reads the whole file; none where it is a GGUF
        if recorded and mine and recorded not in mine:
            raise UserError(
                f"teacher {teacher.name!r} ({teacher.adapter}) was trained on another base than {base}: their "
                f"fingerprints differ ({recorded[:12]} and {min(mine)[:12]}); give the base it was "
                "trained on, or `accept: [base]` on the teacher"
            )
        adapter = (read_adapter if values else adapter_shapes)(teacher.adapter, empty_transformer(base))
        if values and not any(a.any() and b.any() for a, b in adapter.tensors.values()):
            raise UserError(
                f"teacher {teacher.name!r} ({teacher.adapter}) changes nothing, for each layer of it has a half of "
                "zeros; take a file that was saved after training, or write `adapter: base`"
            )
        return TeacherWeights(teacher, adapter)
    start = open_checkpoint(base)
    checkpoint = open_checkpoint(teacher.adapter, like=start)
    odd = scheduler_difference(start, checkpoint)
    if odd and "scheduler" not in teacher.accept:
        raise UserError(
            f"teacher {teacher.name!r} ({teacher.adapter}) was made for another scheduler than the base: {odd}; use a "
            "teacher with the base's scheduler, or `accept: [scheduler]` on the teacher"
        )
    part = None if "components" in teacher.accept else component_difference(start, checkpoint)
    if part:
        raise UserError(
            f"teacher {teacher.name!r} ({teacher.adapter}) has another {part} than the base, and would be run with "
            "the base's; use a teacher that only changed the transformer, or `accept: [components]` on the teacher"
        )
    if checkpoint.sha256 == start.sha256:
        raise UserError(f"teacher {teacher.name!r} ({teacher.adapter}) is the base itself; write `adapter: base`")
    return TeacherWeights(teacher, checkpoint=checkpoint)


def load_teacher(
    weights: TeacherWeights, base: Path, cache: Path, device: torch.device, wanted: bool = False
) -> TeacherWeights:
    """Decide how a whole model is kept: its difference is taken once and lies in `cache` under its hashes.

    `wanted`: the difference is needed in any case (the student starts from it). Others pass as they are.
    """
    teacher, checkpoint = weights.teacher, weights.checkpoint
    if checkpoint is None:
        return weights
    adapter, residual = None, None
    if teacher.residual > 0 or wanted:
        adapter, residual = _difference(teacher, open_checkpoint(base), checkpoint, cache, device)
    streamed = adapter is None or residual is None or residual > teacher.residual
    if streamed and weights.stacks:
        raise UserError(
            f"teacher {teacher.name!r} is a whole model that is streamed, and fast.adapter cannot be put on top of it; "
            "raise its rank or residual so that it is kept as a difference, or set fast.teacher_steps above 1"
        )
    if residual is None:
        return replace(weights, streamed=True)
    if streamed:
        _log.warning(
            "teacher %s is streamed from disk: rank %d would lose %.1f%% of its change (residual %g is allowed)",
            teacher.name, teacher.rank, 100 * residual, teacher.residual,
        )  # fmt: skip
    return replace(weights, adapter=adapter, residual=residual, streamed=streamed)


def _difference(
    teacher: Teacher, base: Checkpoint, tuned: Checkpoint, cache: Path, device: torch.device
) -> tuple[Adapter | None, float]:
    facts = [base.sha256, tuned.sha256, teacher.rank]
    folder = cache / f"difference-{cache_key(*facts)[:16]}"
    if (folder / WEIGHTS).is_file():
        return read_adapter(folder, base.empty()), float(inspect_adapter(folder).record["residual"])
    with progress_bar(f"reading teacher {teacher.name}") as report:
        found = difference(base, tuned, teacher.rank, device=device, report=report)
    if not len(found.adapter):
        return None, found.residual
    write_adapter(found.adapter, folder, metadata={"residual": repr(found.residual)})
    return found.adapter, found.residual


@dataclass(frozen=True)
class RoutedTeacher:
    """A teacher as rows are routed to it: its field, its dataset, and its null prompt (one row, or one each).

    `variants` are the same rows under other conditions, by name, for gates (labelfree/gates/variants.py); `weaker` is
    the teacher at a lower strength, for a contrast.
    """

    name: str
    field: VelocityField
    dataset: Dataset
    null: Condition | None = None
    variants: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)
    weaker: VelocityField | None = None
