"""Held-out prompts and edits that no update learns from, for validation and for the monitor.

Of the built-in scenes they are tasks of its validation split, of the prompt bank its held-out part; of other data, rows
that no update samples. They are
encoded once, like the run's own rows, into the same cache. Edits keep their sizes; rows of one layout and schedule
batch together.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from danceopd.data.dataset import CachedConditions, TeacherData
from danceopd.data.encode import Encoder
from danceopd.data.images import Sources, each_source
from danceopd.data.sources import Edits, Prompts
from danceopd.data.tables import InMemoryTable
from danceopd.errors import UserError
from danceopd.recipe.parts import Teacher
from danceopd.worlds.scenes.edits import Edit
from danceopd.worlds.scenes.prompts import Prompt
from danceopd.worlds.scenes.render import render
from danceopd.worlds.scenes.rows import is_scenes, scene_tasks

TRIED = 40
"""Rows of a table that are tried for each that is wanted: some are sampled by updates, doubles, or faulty."""
FIRST_SEED = 1 << 20
"""Noise seed of the first held-out picture; those of the sample grid begin at 0."""
_log = logging.getLogger("danceopd")


@dataclass(frozen=True)
class Row:
    """One held-out prompt, or instruction with its source image.

    `task` is what the scenes' exact scorer needs; of other data, `index` is the row's number in its table.
    """

    prompt: str
    source: Sources | None = None
    task: Prompt | Edit | None = None
    index: int | None = None


def held_out_rows(teacher: Teacher, spec: str, data: TeacherData, count: int, seed: int) -> list[Row]:
    """`count` rows at most of a teacher's data (opened from `spec`) that no update samples.

    Where there are not two, some that are sampled.
    """
    if is_scenes(spec):
        tasks = scene_tasks(spec, teacher.capability, "val", count, seed)
        return [_made(task, teacher) for task in tasks]
    if (kept := data.data.held_out) is not None:
        edits = isinstance(kept, Edits)
        return [Row(*(kept[i] if edits else (kept[i],))) for i in range(min(count, len(kept)))]
    table, sampled, found = data.data, set(data.rows), dict[str, Row]()
    # the name is part of the random stream: which rows are held out depends on it
    tried = random.Random(f"watch/{seed}").sample(range(len(table)), min(len(table), TRIED * count))
    for row in sorted(tried, key=sampled.__contains__):
        if len(found) == count or (row in sampled and len(found) > 1):
            break
        try:
            prompt, source = table[row] if isinstance(table, Edits) else (table[row], None)
            if isinstance(table, Edits):
                table.sizes(row)
            found.setdefault(prompt, Row(prompt, source, None, row))
        except UserError:
            continue
    if sampled.issuperset(tried):
        _log.warning(
            "teacher %s: training samples every row of %s, so validation uses rows that are trained on; add a few rows",
            teacher.name, spec,
        )  # fmt: skip
    elif len(found) < count:
        _log.warning(
            "teacher %s: %s has only %d rows that training does not sample, and %d were to be held out; add rows",
            teacher.name, spec, len(found), count,
        )  # fmt: skip
    return list(found.values())


def encode_rows(
    capability: str, encoder: Encoder, rows: Sequence[Row], steps: int, prompts: Sequence[str] | None = None
) -> CachedConditions:
    """The rows as conditions of a capability, numbered as they stand, for rollouts of so many `steps`.

    With other `prompts`, where given.
    """
    prompts = [row.prompt for row in rows] if prompts is None else prompts
    if capability != "editing":
        data = Prompts(InMemoryTable("held-out rows", [{"prompt": prompt} for prompt in prompts]))
    else:
        cells = [
            {
                "instruction": prompt,
                "source": [str(s) if isinstance(s, Path) else s for s in each_source(row.source or [])],
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        data = Edits(InMemoryTable("held-out rows", cells))
    return encoder.encode(capability, data, range(len(prompts)), steps)


def by_layout(dataset: CachedConditions, rows: Iterable[int]) -> list[list[int]]:
    """The rows by layout and schedule."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        key = dataset.layout(row), tuple(dataset.sigmas(row).tolist())
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _made(task: Prompt | Edit, teacher: Teacher) -> Row:
    if isinstance(task, Prompt):
        return Row(teacher.worded(task.prompt), None, task)
    return Row(teacher.worded(task.instruction), Image.fromarray(render(task.source)), task)
