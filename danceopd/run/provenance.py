"""What a run learns from, so that it is continued with the same: fingerprints of its data and of its weights.

Of the data: the number of rows, and of each row that an update samples its prompt, the name and size in bytes of its
source picture, and of its target and paraphrases where the recipe reads them; no time of a file, so a copy is the same.
Not covered are rows that no update samples, a picture replaced by another of the same name and size, and the pictures
inside a hub dataset. The built-in scenes are made from the recipe and need no record. Of the weights: the hashes of
the base and of every teacher. Several processes must have been given the same of all this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.common.distributed import Processes
from danceopd.common.files import write_json
from danceopd.data.dataset import TeacherData, sampled_rows
from danceopd.data.folders import HubTable
from danceopd.data.images import ImageSource
from danceopd.data.sources import Edits, Prompts
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.run.directory import differences
from danceopd.worlds.scenes.rows import is_scenes

RECORD = "data.json"  # in the run folder
PIECES = 1024
"""Fingerprints kept for a teacher, at most: of so many runs of drawn rows, in order."""


def check_data(run: Path, recipe: Recipe, datasets: Mapping[str, TeacherData], record: bool = True) -> None:
    """UserError, which names the row, where the run in folder `run` began with other data; `record`: write it down.

    A run that is given more steps is recorded with them; one that is given fewer keeps its record.
    """
    path = run / RECORD
    old = _read(path)
    names = [teacher.name for teacher in recipe.teachers if not is_scenes(recipe.data_source(teacher))]
    before = int(old.get("steps", 0))
    if old:
        drawn = _sampled(recipe, datasets, before)
        for name in names:
            data, then = datasets[name].data, old["teachers"].get(name)
            if then is None:
                continue
            if then["rows"] != len(data):
                raise UserError(
                    f"{data.table.path} has {len(data)} rows and had {then['rows']} when the run in {run} began; put "
                    "the old data back, or choose another --output"
                )
            pieces = _pieces(drawn[name])
            for piece, found, wanted in zip(pieces, _fingerprints(recipe, data, pieces), then["drawn"], strict=False):
                if found != wanted:
                    where = data.where(piece[0])
                    where = where if len(piece) == 1 else f"a row from {where} to {data.where(piece[-1])}"
                    raise UserError(
                        f"{where} is no longer what the run in {run} began with; put the old data back, or choose "
                        "another --output"
                    )
    if not names or before >= recipe.steps or not record:
        return
    drawn = _sampled(recipe, datasets, recipe.steps)
    sampled = {
        name: {
            "source": recipe.data_source(teacher),
            "rows": len(datasets[name].data),
            "drawn": _fingerprints(recipe, datasets[name].data, _pieces(drawn[name])),
        }
        for teacher in recipe.teachers
        if (name := teacher.name) in names
    }
    write_json(path, {"steps": recipe.steps, "teachers": sampled})


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
            f"{path} is damaged, so nobody knows which data this run is trained on; choose another --output, or delete "
            "the file if the data are still the same"
        ) from None


def _sampled(recipe: Recipe, datasets: Mapping[str, TeacherData], steps: int) -> dict[str, list[int]]:
    """The rows that the recipe with so many steps samples, by teacher."""
    if steps == recipe.steps:
        return {name: one.rows for name, one in datasets.items()}
    lengths = [len(datasets[teacher.name].data) for teacher in recipe.teachers]
    rows = sampled_rows(replace(recipe.sampling, steps=steps), lengths)
    return {teacher.name: sorted(mine) for teacher, mine in zip(recipe.teachers, rows, strict=True)}


def _pieces(rows: Sequence[int]) -> list[list[int]]:
    return [piece.tolist() for piece in np.array_split(np.array(rows), min(len(rows), PIECES))]


def _fingerprints(recipe: Recipe, data: Prompts, pieces: Sequence[Sequence[int]]) -> list[str]:
    """A fingerprint of each piece's rows."""
    return [
        hashlib.sha256(json.dumps([_facts(recipe, data, row) for row in piece]).encode()).hexdigest()[:16]
        for piece in pieces
    ]


def _facts(recipe: Recipe, data: Prompts, row: int) -> list[Any]:
    """What a run depends on of a row, as plain data."""
    pictures = not isinstance(data.table, HubTable)
    facts: list[Any] = [row, data.prompt(row)]
    if isinstance(data, Edits) and pictures:
        facts.append(_picture(data[row][1]))
    if recipe.needs_targets and pictures:
        facts.append(_picture(data.target(row)))
    if recipe.gates.on:
        facts += [data.paraphrases(row), data.expanded(row)]
    return facts


def _picture(source: ImageSource) -> list[Any]:
    if isinstance(source, Path):
        return [source.name, source.stat().st_size]
    if isinstance(source, bytes):
        return [len(source)]
    return [source.mode, *source.size]


TEACHERS = "teachers.json"  # in the run folder: whose weights this run learns from


def check_weights(
    run: Path, base_sha256: str, known: Iterable[TeacherWeights], record: bool = True
) -> dict[str, Any]:
    """Whose weights a run learns from; `record`: write it into its folder, once.

    UserError when the folder already names others: a run is continued with the weights it began with.
    """
    teachers = {
        k.teacher.name: {"kind": k.kind, "sha256": k.sha256}
        | ({} if k.residual is None else {"residual": round(k.residual, 6), "rank": k.teacher.rank})
        for k in known
    }
    facts = {"base": base_sha256, "teachers": teachers}
    path = run / TEACHERS
    old = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old = {"base": before["base"], **{name: t["sha256"] for name, t in before["teachers"].items()}}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{path} is damaged, so nobody knows whose weights this run learns from; choose another --output, or "
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
    if record:
        write_json(path, facts)
    return facts


def shared_facts(recipe: Recipe) -> dict[str, Any]:
    """What several processes must have been given alike: all but where things are on their machines."""
    given = recipe.resolved()
    for place in ("output", "device", "base", "editing_base", "data"):
        del given[place]
    given["teachers"] = [{k: v for k, v in one.items() if k not in ("adapter", "data")} for one in given["teachers"]]
    return {**given, "rows": recipe.data.rows}


def refuse_unequal(processes: Processes, mine: dict[str, Any], what: str) -> None:
    """UserError in the first process, and a quiet end of the others, where they have different facts."""
    given = processes.all_gather(mine)
    for rank, theirs in enumerate(given):
        for key, first, other in differences(given[0], theirs):
            if not processes.is_main:
                raise SystemExit(2)
            raise UserError(
                f"process {rank} was given another {what} than the first ({key} is {other!r}, not {first!r}); give "
                "all of them the same"
            )
