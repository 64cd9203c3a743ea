"""Which data a run learns from, so that it is continued with the same: a fingerprint of the rows that it draws.

Seen are the number of rows, and of each row that an update draws (or has drawn) its words, the name and size in bytes
of its source picture, and of its target and other wordings where the recipe reads them; no time of a file, so a copy
is the same. Not seen are rows that no update draws, a picture replaced by another of the same name and size, and the
pictures inside a hub dataset. The exact world's rows are made from the recipe and need no record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.data import Edits, Prompts, Source, is_made
from danceopd.disk import disk_faults, replace_file
from danceopd.errors import UserError
from danceopd.folders import HubTable
from danceopd.objectives import needs_targets
from danceopd.recipe import Recipe
from danceopd.work import Asked, rows_drawn

RECORD = "data.json"  # in the run folder
PIECES = 1024
"""Fingerprints kept for a teacher, at most: of so many runs of drawn rows, in order."""


def remember_data(run: Path, recipe: Recipe, asked: Mapping[str, Asked]) -> None:
    """Write what the run in folder `run` draws; UserError, which names the row, where it began with other data.

    A run that is given more steps is recorded with them; one that is given fewer keeps its record.
    """
    path = run / RECORD
    old = _read(path)
    names = [teacher.name for teacher in recipe.teachers if not is_made(recipe.work(teacher))]
    before = int(old.get("steps", 0))
    if old:
        drawn = _drawn(recipe, asked, before)
        for name in names:
            data, then = asked[name].data, old["teachers"].get(name)
            if then is None:
                continue
            if then["rows"] != len(data):
                raise UserError(
                    f"{data.table.path} has {len(data)} rows and had {then['rows']} when the run in {run} began; put "
                    "the old data back, or choose another --output"
                )
            pieces = _pieces(drawn[name])
            for piece, found, wanted in zip(pieces, _prints(recipe, data, pieces), then["drawn"], strict=False):
                if found != wanted:
                    where = data.where(piece[0])
                    where = where if len(piece) == 1 else f"a row from {where} to {data.where(piece[-1])}"
                    raise UserError(
                        f"{where} is no longer what the run in {run} began with; put the old data back, or choose "
                        "another --output"
                    )
    if not names or before >= recipe.steps:
        return
    drawn = _drawn(recipe, asked, recipe.steps)
    record = {
        name: {
            "source": recipe.work(teacher),
            "rows": len(asked[name].data),
            "drawn": _prints(recipe, asked[name].data, _pieces(drawn[name])),
        }
        for teacher in recipe.teachers
        if (name := teacher.name) in names
    }
    with disk_faults(path):
        replace_file(path, json.dumps({"steps": recipe.steps, "teachers": record}, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    """The record, empty where there is none yet."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "steps": int(found["steps"]),
            "teachers": {n: {"rows": t["rows"], "drawn": list(t["drawn"])} for n, t in found["teachers"].items()},
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{path} is damaged, so nobody knows which data this run learnt from; choose another --output, or delete "
            "the file if the data are still the same"
        ) from None


def _drawn(recipe: Recipe, asked: Mapping[str, Asked], steps: int) -> dict[str, list[int]]:
    """The rows that the recipe with so many steps draws, by teacher."""
    if steps == recipe.steps:
        return {name: one.rows for name, one in asked.items()}
    lengths = [len(asked[teacher.name].data) for teacher in recipe.teachers]
    rows = rows_drawn(recipe.model_copy(update={"steps": steps}), lengths)
    return {teacher.name: sorted(mine) for teacher, mine in zip(recipe.teachers, rows, strict=True)}


def _pieces(rows: Sequence[int]) -> list[list[int]]:
    return [piece.tolist() for piece in np.array_split(np.array(rows), min(len(rows), PIECES))]


def _prints(recipe: Recipe, data: Prompts, pieces: Sequence[Sequence[int]]) -> list[str]:
    """A fingerprint of each piece's rows."""
    return [
        hashlib.sha256(json.dumps([_seen(recipe, data, row) for row in piece]).encode()).hexdigest()[:16]
        for piece in pieces
    ]


def _seen(recipe: Recipe, data: Prompts, row: int) -> list[Any]:
    """What of a row a run depends on, as plain data."""
    pictures = not isinstance(data.table, HubTable)
    seen: list[Any] = [row, data.words(row)]
    if isinstance(data, Edits) and pictures:
        seen.append(_picture(data[row][1]))
    if needs_targets(recipe) and pictures:
        seen.append(_picture(data.target(row)))
    if recipe.gates.on:
        seen += [data.paraphrases(row), data.expanded(row)]
    return seen


def _picture(source: Source) -> list[Any]:
    if isinstance(source, Path):
        return [source.name, source.stat().st_size]
    return [source.mode, *source.size]
