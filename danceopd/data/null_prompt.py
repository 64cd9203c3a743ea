"""The null (unconditional) prompt of a teacher, as its stock pipeline encodes it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.common.cache import cache_key
from danceopd.common.files import disk_errors
from danceopd.common.messages import clipped
from danceopd.data.store import UNREADABLE
from danceopd.errors import UserError
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline, check_prompts
from danceopd.pipelines.record import record
from danceopd.recipe.parts import Teacher

_log = logging.getLogger("danceopd")


def null_condition(pipeline: GenerationPipeline, teacher: Teacher, base_sha256: str, cache: Path) -> Condition:
    """The teacher's null prompt (see `null_prompt`), kept in `cache`."""
    facts = [teacher.negative, base_sha256, teacher.capability, pipeline.family.name, pipeline.call]
    path = cache / f"null-{cache_key(*facts)[:16]}.safetensors"
    if path.exists():
        try:
            return Condition.from_state(load_file(path))
        except UNREADABLE as error:
            _log.warning("%s is damaged (%s); it is encoded again", path, clipped(str(error), 120))
    found = null_prompt(pipeline, teacher.name, teacher.negative)
    partial = path.with_suffix(".partial")
    with disk_errors(path):
        cache.mkdir(parents=True, exist_ok=True)
        save_file(found.state(), partial)
        partial.replace(path)
    return found


def check_guidance(family: Family, name: str, editing: bool = False) -> None:
    """UserError where a family has no classifier-free guidance, or none of edits (`editing`).

    `name` is the key of the recipe that needs it.
    """
    if family.guidance_on is None:
        raise UserError(f"{name} needs classifier-free guidance, and {family.name} has none; leave it out")
    if editing and family.source_text:
        raise UserError(
            f"{name} needs a null prompt, which {family.name} reads together with the source image, so edits of this "
            "family cannot be guided; leave it out, or leave out the editing teachers"
        )


@torch.no_grad()
def null_prompt(pipeline: GenerationPipeline, name: str, negative: str | None = None) -> Condition:
    """The null prompt of teacher `name`, one row, as the stock pipeline encodes it.

    The prompt is `negative`, else the family's own (most often empty). UserError when the family has no
    classifier-free guidance, or when its null prompt reads the source image, so that one row is not enough.
    """
    family = pipeline.family
    check_guidance(family, f"the null prompt of teacher {name!r}")
    if negative is None:
        negative = str(family.guidance_on(2.0).get("negative_prompt", ""))
    elif negative.strip():
        check_prompts(pipeline.pipe, family, [negative], pipeline.call)
    found = _null(pipeline, negative)
    if found is None:
        raise UserError(
            f"the null prompt of {family.name} is read together with the source image, so editing teachers of this "
            "family cannot be guided; leave guidance out"
        )
    return found


@torch.no_grad()
def contrast_null(pipeline: GenerationPipeline, teacher: Teacher) -> Condition | None:
    """The null prompt of a gate's contrast, one row: the teacher's negative prompt, else the family's own or an empty
    one.

    None where a family reads it together with the source image, so that one row is not enough.
    """
    guided = pipeline.family.guidance_on
    negative = "" if guided is None else str(guided(2.0).get("negative_prompt", ""))
    return _null(pipeline, negative if teacher.negative is None else teacher.negative)


def _null(pipeline: GenerationPipeline, negative: str) -> Condition | None:
    pipe, family, call = pipeline.pipe, pipeline.family, pipeline.call
    if not isinstance(pipeline, EditingPipeline):
        return record(pipe, family, prompt=[negative], **call)[0]
    size = max(pipeline.width, family.smallest_source), max(pipeline.height, family.smallest_source)
    several = family.references(type(pipe).__name__) > 1  # a null prompt of two sources has all parts of any number
    rows = []
    for colour in ("grey", "red"):
        image = Image.new("RGB", size, colour)
        given = {**call, "image": [image, image] if several else image, "prompt": negative}
        rows.append(record(pipe, family, **given)[0])
    one, other = ([row.kwargs[key] for key in family.prompt_kwargs] for row in rows)
    same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other))
    return rows[0] if same else None
