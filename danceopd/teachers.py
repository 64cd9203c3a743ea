"""Teachers of every kind on one backbone: what a recipe's teacher is, and the velocity field it becomes.

The bare base and LoRAs cost their adapters. A whole model is kept as its low-rank difference from the base when
that loses less than the recipe's `residual`, else it is streamed (streamed.py); either way no second model is
resident. Any of them may be guided (classifier-free), with the null prompt as the stock pipeline encodes it.
All that can be refused is refused by `look`, from headers and hashes, before anything large is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.backbone import Backbone
from danceopd.base_model import base_fingerprint, empty_transformer
from danceopd.checkpoint import (
    Checkpoint,
    component_difference,
    is_checkpoint,
    open_checkpoint,
    scheduler_difference,
)
from danceopd.disk import disk_faults, replace_file
from danceopd.errors import UserError
from danceopd.extract import difference, progress
from danceopd.fields import AdapterField, GuidedField, MergedField, VelocityField
from danceopd.lora import WEIGHTS, Adapter, inspect_adapter, read_adapter, write_adapter
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.generation import GenerationPipeline, check_prompts
from danceopd.pipelines.record import Condition, record
from danceopd.recipe import Teacher
from danceopd.store import key_of
from danceopd.streamed import StreamedField

_log = logging.getLogger("danceopd")
SOURCES = "teachers.json"  # in the run folder: whose weights this run learns from


@dataclass(frozen=True, eq=False)
class Known:
    """A teacher whose files were looked at. `adapter` is a LoRA as read, or a whole model's low-rank difference;
    `checkpoint` the whole model; `residual` what the difference loses of it; `streamed` whether it is run whole."""

    teacher: Teacher
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None
    residual: float | None = None
    streamed: bool = False

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

    def field(self, backbone: Backbone, null: Condition | None = None, merged: bool = True) -> VelocityField:
        """Its velocity field; an adapter joins the backbone under the teacher's name. `null` guides it.

        `merged`: an adapter may be merged into the weights where that is cheaper, and costs no digits.
        """
        teacher = self.teacher
        field: VelocityField
        if self.streamed:
            assert self.checkpoint is not None
            field = StreamedField(backbone, self.checkpoint, teacher.scale)
        else:
            if self.adapter is not None:
                backbone.add_adapter(teacher.name, self.adapter, teacher.scale)
            name = None if self.adapter is None else teacher.name
            cheaper = merged and name is not None and backbone.forms(name)
            field = MergedField(backbone, teacher.name) if cheaper else AdapterField(backbone, name)
        if teacher.guidance is None:
            return field
        if null is None:
            raise ValueError(f"teacher {teacher.name!r} is guided and has no null condition")
        return GuidedField(field, null, teacher.guidance)


def look(teachers: Iterable[Teacher], base: Path) -> list[Known]:
    """What the teachers of a recipe are, in order; whole models are opened, not loaded.

    UserError for a teacher that is no match for `base` (a pipeline folder): another architecture, other tensors,
    a LoRA recorded for another base, a pipeline with another scheduler, or the base itself as a whole model.
    """
    return [_look(teacher, base) for teacher in teachers]


def _look(teacher: Teacher, base: Path) -> Known:
    if teacher.adapter == "base":
        return Known(teacher)
    if not is_checkpoint(teacher.adapter):
        said = inspect_adapter(teacher.adapter).record.get("base_sha256")
        if said and "base" not in teacher.accept and said != base_fingerprint(base):
            raise UserError(
                f"teacher {teacher.name!r} ({teacher.adapter}) was trained on another base than {base}: their "
                f"fingerprints differ ({said[:12]} and {base_fingerprint(base)[:12]}); give the base it was trained "
                "on, or `accept: [base]` on the teacher"
            )
        adapter = read_adapter(teacher.adapter, empty_transformer(base))
        if not any(a.any() and b.any() for a, b in adapter.tensors.values()):
            raise UserError(
                f"teacher {teacher.name!r} ({teacher.adapter}) changes nothing, for each layer of it has a half of "
                "zeros; take a file that was saved after training, or write `adapter: base`"
            )
        return Known(teacher, adapter)
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
            f"teacher {teacher.name!r} ({teacher.adapter}) has another {part} than the base, and would be asked with "
            "the base's; use a teacher that only changed the transformer, or `accept: [components]` on the teacher"
        )
    if checkpoint.sha256 == start.sha256:
        raise UserError(f"teacher {teacher.name!r} ({teacher.adapter}) is the base itself; write `adapter: base`")
    return Known(teacher, checkpoint=checkpoint)


def prepare(known: Known, base: Path, cache: Path, device: torch.device, wanted: bool = False) -> Known:
    """Decide how a whole model is kept: its difference is taken once and lies in `cache` under its hashes.

    `wanted`: the difference is needed in any case (the student starts from it). Others pass as they are.
    """
    teacher, checkpoint = known.teacher, known.checkpoint
    if checkpoint is None:
        return known
    if teacher.residual == 0 and not wanted:
        return replace(known, streamed=True)
    adapter, residual = _difference(teacher, open_checkpoint(base), checkpoint, cache, device)
    streamed = adapter is None or residual > teacher.residual
    if streamed:
        _log.warning(
            "teacher %s is streamed from disk: rank %d would lose %.1f%% of its change (residual %g is allowed)",
            teacher.name, teacher.rank, 100 * residual, teacher.residual,
        )  # fmt: skip
    return replace(known, adapter=adapter, residual=residual, streamed=streamed)


def _difference(
    teacher: Teacher, base: Checkpoint, tuned: Checkpoint, cache: Path, device: torch.device
) -> tuple[Adapter | None, float]:
    facts = [base.sha256, tuned.sha256, teacher.rank]
    folder = cache / f"difference-{key_of(*facts)[:16]}"
    if (folder / WEIGHTS).is_file():
        return read_adapter(folder, base.empty()), float(inspect_adapter(folder).record["residual"])
    with progress(f"reading teacher {teacher.name}") as report:
        found = difference(base, tuned, teacher.rank, device=device, report=report)
    if not len(found.adapter):
        return None, found.residual
    write_adapter(found.adapter, folder, metadata={"residual": repr(found.residual)})
    return found.adapter, found.residual


def null_condition(drawer: GenerationPipeline, teacher: Teacher, base_sha256: str, cache: Path) -> Condition:
    """The teacher's null prompt (see `null_prompt`), kept in `cache`."""
    facts = [teacher.negative, base_sha256, teacher.capability, drawer.family.name, drawer.call]
    path = cache / f"null-{key_of(*facts)[:16]}.safetensors"
    if path.exists():
        return Condition.from_state(load_file(path))
    found = null_prompt(drawer, teacher.name, teacher.negative)
    partial = path.with_suffix(".partial")
    with disk_faults(path):
        cache.mkdir(parents=True, exist_ok=True)
        save_file(found.state(), partial)
        partial.replace(path)
    return found


@torch.no_grad()
def null_prompt(drawer: GenerationPipeline, name: str, negative: str | None = None) -> Condition:
    """The null prompt of teacher `name`, one row, as the stock pipeline encodes it.

    The prompt is `negative`, else the family's own (most often empty). UserError when the family has no
    classifier-free guidance, or when its null prompt reads the source image, so that one row is not enough.
    """
    family = drawer.family
    if family.guided is None:
        raise UserError(f"teacher {name!r} is guided, and {family.name} has no classifier-free guidance")
    if negative is None:
        negative = str(family.guided(2.0).get("negative_prompt", ""))
    elif negative.strip():
        check_prompts(drawer.pipe, family, [negative], drawer.call)
    found = _null(drawer, negative)
    if found is None:
        raise UserError(
            f"the null prompt of {family.name} is read together with the source image, so editing teachers of this "
            "family cannot be guided; leave guidance out"
        )
    return found


@torch.no_grad()
def contrast_null(drawer: GenerationPipeline, teacher: Teacher) -> Condition | None:
    """What gates ask instead of a prompt: the teacher's negative prompt, the family's own, or an empty one; one row.

    None where a family reads it together with the source image, so that one row is not enough.
    """
    guided = drawer.family.guided
    negative = "" if guided is None else str(guided(2.0).get("negative_prompt", ""))
    return _null(drawer, negative if teacher.negative is None else teacher.negative)


def _null(drawer: GenerationPipeline, negative: str) -> Condition | None:
    pipe, family, call = drawer.pipe, drawer.family, drawer.call
    if not isinstance(drawer, EditingPipeline):
        return record(pipe, family, prompt=[negative], **call)[0]
    size = max(drawer.width, family.smallest_source), max(drawer.height, family.smallest_source)
    rows = []
    for colour in ("grey", "red"):
        image = Image.new("RGB", size, colour)
        words = family.encode(pipe, [negative], [image], **call)[0]
        rows.append(record(pipe, family, **{**call, "image": image, **words})[0])
    one, other = ([row.kwargs[key] for key in family.prompt_kwargs] for row in rows)
    same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other))
    return rows[0] if same else None


def remember(run: Path, base_sha256: str, known: Iterable[Known]) -> dict[str, Any]:
    """Write whose weights a run learns from into its folder, once; returns the facts.

    UserError when the folder already names others: a run is continued with the weights it began with.
    """
    teachers = {
        k.teacher.name: {"kind": k.kind, "sha256": k.sha256}
        | ({} if k.residual is None else {"residual": round(k.residual, 6), "rank": k.teacher.rank})
        for k in known
    }
    facts = {"base": base_sha256, "teachers": teachers}
    path = run / SOURCES
    old = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old = {"base": before["base"], **{name: t["sha256"] for name, t in before["teachers"].items()}}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{path} is damaged, so nobody knows whose weights this run learnt from; choose another --output, or "
                "delete the file if base and teachers are still the same"
            ) from None
    now = {"base": base_sha256, **{name: t["sha256"] for name, t in teachers.items()}}
    changed = next((name for name in now if name in old and old[name] != now[name]), None)
    if changed is not None:
        who = "the base" if changed == "base" else f"teacher {changed!r}"
        raise UserError(
            f"{who} is no longer what the run in {run} began with (sha256 {str(old[changed])[:12]} then, "
            f"{str(now[changed])[:12]} now); put the old weights back, or choose another --output"
        )
    with disk_faults(path):
        replace_file(path, json.dumps(facts, indent=1).encode())
    return facts

