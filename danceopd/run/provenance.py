"""What a run learns from, so that it is continued with the same: fingerprints of its data and of its weights.

Of the data: the number of rows, and of each row that an update samples its prompt, the name and size in bytes of its
source picture, and of its target and paraphrases where the recipe reads them; no time of a file, so a copy is the same.
Not covered are rows that no update samples, a picture replaced by another of the same name and size, and the pictures
inside a hub dataset. The built-in scenes are made from the recipe and need no record. Of the weights: the hashes of
the base, of its encoders, of every teacher and of the LoRA that the student started as. With the same of all this a run
goes on wherever it lies. Several processes must have been given the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.adapters.header import WEIGHTS, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.cache import cache_key
from danceopd.common.distributed import Processes
from danceopd.common.files import write_json
from danceopd.common.parse import read_json
from danceopd.common.shipped import portable
from danceopd.data.bank.rows import BankEdits
from danceopd.data.dataset import TeacherData, sampled_rows
from danceopd.data.encode import encoders_fingerprint
from danceopd.data.folders import HubTable
from danceopd.data.images import ImageSource, each_source
from danceopd.data.sources import Edits, Prompts
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, base_fingerprints, base_folder, empty_transformer
from danceopd.models.lora import Adapter
from danceopd.plugins import origin
from danceopd.recipe.checks import plugged
from danceopd.recipe.recipe import Recipe
from danceopd.run.checkpoints import CheckpointStore
from danceopd.run.directory import (
    DATA,
    PLUGINS,
    START,
    TEACHERS,
    begun_recipe,
    check_directory,
    differences,
    init_sha256,
)
from danceopd.worlds.scenes.rows import is_scenes

_log = logging.getLogger("danceopd")
PIECES = 1024
"""Fingerprints kept for a teacher, at most: of so many runs of drawn rows, in order."""


def check_data(run: Path, recipe: Recipe, datasets: Mapping[str, TeacherData], record: bool = True) -> None:
    """UserError, which names the row, where the run in folder `run` began with other data; `record`: write it down.

    A run that is given more steps is recorded with them; one that is given fewer keeps its record.
    """
    path = run / DATA
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
        source = data[row][1]  # of the bank, a name has its prompt's hash, and the file may not be drawn yet
        facts += [source.name] if isinstance(data, BankEdits) else [_picture(one) for one in each_source(source)]
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


def check_weights(
    run: Path, recipe: Recipe, base: Path, known: Sequence[TeacherWeights], record: bool = True
) -> dict[str, Any]:
    """Whose weights a run learns from (`base` is the base's folder); `record`: write it into the run's folder, once.

    UserError when the folder already names others: a run is continued with the weights it began with.
    """
    base_sha256, extra = base_fingerprint(base, recipe.gguf), recipe.editing_base
    bases = [base, *([Path(extra)] if extra and Path(extra).is_dir() else [])]
    encoders, init = cache_key(*map(encoders_fingerprint, bases)), init_sha256(recipe.student.init)
    teachers = {
        k.teacher.name: {"kind": k.kind, "sha256": k.sha256}
        | ({} if k.residual is None else {"residual": round(k.residual, 6), "rank": k.teacher.rank})
        for k in known
    }
    facts = {"base": base_sha256, "encoders": encoders, "teachers": teachers} | ({"init": init} if init else {})
    few = next((k.fast for k in known if k.fast is not None), None)
    fast = {} if few is None else {"fast.adapter": few.sha256}
    facts |= fast
    path = run / TEACHERS
    old = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old = {name: before[name] for name in ("base", "encoders", *fast) if name in before}
            old |= {f"teacher {name!r}": t["sha256"] for name, t in before["teachers"].items()}
            facts |= {"init": before["init"]} if "init" in before else {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{path} is damaged, so nobody knows whose weights this run learns from; choose another --output, or "
                "delete the file if base and teachers are still the same"
            ) from None
    now: dict[str, Any] = {"base": base_sha256, "encoders": encoders, **fast}
    now |= {f"teacher {name!r}": t["sha256"] for name, t in teachers.items()}
    changed = next((name for name in now if name in old and old[name] != now[name]), None)
    if changed is not None:
        who = {"base": "the base", "encoders": "what encodes prompts and images in the base"}.get(changed, changed)
        raise UserError(
            f"{who} is no longer what the run in {run} began with (sha256 {str(old[changed])[:12]} then, "
            f"{str(now[changed])[:12]} now); put the old weights back, or choose another --output"
        )
    if record:
        write_json(path, facts)
    return facts


def record_plugins(run: Path, recipe: Recipe) -> None:
    """Write down which plug-ins a run learns with; one that is another than before is warned of, and the run goes on.

    `plugins.json` has, by kind and name, each version in order: package and version, or file, and the file's sha256.
    """
    path, used = run / PLUGINS, plugged(recipe)
    known: dict[str, Any] = read_json(path, "the record of plug-ins") if path.is_file() else {}
    for kind, name, _ in used:
        now, before = str(origin(kind, name)), known.setdefault(f"{kind} {name}", [])
        if before and before[-1] != now:
            _log.warning("%s %s is %s and was %s before; the run goes on with it", kind, name, now, before[-1])
        if not before or before[-1] != now:
            before.append(now)
    if used:
        write_json(path, known)


def start_from(recipe: Recipe, run: Path) -> Recipe:
    """A recipe whose student starts at what the run in folder `run` has learnt: its student, else the EMA of its newest
    checkpoint. That LoRA is copied into the output folder, so the run need not stay where it is.

    UserError where there is neither, where the base is another or the rank larger, and for the output folder itself.
    """
    if run.resolve() == recipe.output.resolve():
        raise UserError(f"--from {run} is the output folder itself, which goes on without it; name another --output")
    folder = recipe.output.absolute() / START
    started = recipe.replaced({"student.init": str(folder)})
    if begun_recipe(recipe.output, started) is not None:
        if not (folder / WEIGHTS).is_file():
            raise UserError(
                f"output folder {recipe.output} holds a run that began without --from; choose another --output"
            )
        begun = inspect_adapter(folder).record.get("started", "another student")
        if f"run {run.resolve().name!r} " not in begun:
            _log.warning("the run in %s began at %s and goes on from where it is; --from %s is not read",
                         recipe.output, begun, run)  # fmt: skip
        return started
    base = base_folder(recipe.base)
    adapter, step, trained_on = _learnt(run, base)
    if trained_on not in base_fingerprints(base, recipe.gguf):
        raise UserError(f"--from {run} was trained on another base than {base}; give its base, or another run")
    if adapter.rank > recipe.student.rank:
        raise UserError(
            f"--from {run} has rank {adapter.rank} and student.rank is {recipe.student.rank}; set student.rank "
            f"{adapter.rank}, or leave --from out and write student.init: {run} to start at what rank "
            f"{recipe.student.rank} keeps of it"
        )
    check_directory(recipe.output, started)
    words = f"the EMA of the run {run.resolve().name!r} after step {step}"
    facts = {"base": portable(str(base)), "steps": str(step), "started": words}
    if trained_on in base_fingerprints(base):  # not of a GGUF, whose LoRAs fit the base in full precision
        facts["base_sha256"] = trained_on
    write_adapter(adapter, folder, metadata=facts)
    return started


def _learnt(run: Path, base: Path) -> tuple[Adapter, int, str]:
    """What a run has learnt, after how many steps, and the fingerprint of its base."""
    if (run / WEIGHTS).is_file():
        record = inspect_adapter(run / WEIGHTS).record
        trained_on = record.get("base_sha256")
        if trained_on is None and (run / TEACHERS).is_file():  # on a GGUF
            trained_on = read_json(run / TEACHERS, "the record of the teachers").get("base")
        if "steps" in record and trained_on is not None:
            return read_adapter(run / WEIGHTS, empty_transformer(base)), int(record["steps"]), trained_on
    saved = CheckpointStore(run / "checkpoints", 1).load() if (run / "checkpoints").is_dir() else None
    if saved is None:
        raise UserError(f"--from {run} is no run with a student or a checkpoint; give a run's folder (for a LoRA, "
                        "student.init: FILE in the recipe)")  # fmt: skip
    if "modules" not in saved.meta:
        raise UserError(f"the checkpoint in {run} is of an earlier version and does not name its layers; let that run "
                        "end, such as with fewer steps, and start from its student")  # fmt: skip
    halves = [saved.tensors[f"average.{i}"] for i in range(2 * len(saved.meta["modules"]))]
    if not all(half.isfinite().all() for half in halves):
        raise UserError(f"the newest checkpoint in {run} holds NaN or infinite numbers; take another run")
    pairs = zip(halves[::2], halves[1::2], strict=True)
    return Adapter(dict(zip(saved.meta["modules"], pairs, strict=True))), saved.step, saved.meta["weights"]["base"]


def shared_facts(recipe: Recipe) -> dict[str, Any]:
    """What several processes must have been given alike: all but where things are on their machines."""
    given = recipe.resolved()
    for place in ("output", "device", "base", "editing_base", "gguf", "data"):
        del given[place]
    given["teachers"] = [{k: v for k, v in one.items() if k not in ("adapter", "data")} for one in given["teachers"]]
    given["fast"] = {key: value for key, value in (given["fast"] or {}).items() if key != "adapter"}
    plugins = {f"{kind} {name}": str(origin(kind, name)) for kind, name, _ in plugged(recipe)}
    return {**given, "rows": recipe.data.rows, "plugins": plugins}


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
