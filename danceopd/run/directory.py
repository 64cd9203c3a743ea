"""The run directory: what a merge writes, so that it can be followed, trusted and continued.

    recipe.yaml  data.json  teachers.json  plugins.json  trackers.json  metrics.jsonl  logs/
    samples/step-000050.png  validation.json  validation.png
    checkpoints/step-000050/{state.safetensors,meta.json,manifest.json}
    monitor.jsonl  monitor.json  checkpoints/good-000050/…         of a monitored run (labelfree/monitor.py)
    pytorch_lora_weights.safetensors  README.md  finished.json     of a finished one

Making a `RunDirectory` creates, continues or refuses the folder, and locks it. Nothing in it is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from danceopd.adapters.header import inspect_adapter
from danceopd.common.files import (
    disk_errors,
    is_partial,
    lock_file,
    numbered_folders,
    remove_partial_files,
    write_atomic,
    write_json,
)
from danceopd.common.parse import read_json
from danceopd.errors import UserError
from danceopd.models.base import file_sha256
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.recorded import recorded_recipe
from danceopd.run.checkpoints import CheckpointStore
from danceopd.run.logger import Logger
from danceopd.run.trackers.tracker import IDS, trackers_of

FINISHED, WEIGHTS = "finished.json", "pytorch_lora_weights.safetensors"
DATA, TEACHERS = "data.json", "teachers.json"
"""Fingerprints of what a run learns from (provenance.py)."""
PLUGINS = "plugins.json"
"""The plug-ins of a run, and all that each was (provenance.py)."""
DIVERGED = "diverged.json"
"""Where the loss was not finite, from which checkpoint the run went on, and the learning rate before that."""
START = "start"
"""A folder with the LoRA of another run that this one starts as (provenance.py)."""
AT_START = (DATA, TEACHERS, PLUGINS, DIVERGED, IDS, "validation.json", "validation.png", "monitor.json")
"""What a run writes as it begins, which is deleted where nothing was trained yet."""
OLD_NAMES = {"gap.json": "validation.json", "gap.png": "validation.png", "watch.json": "monitor.json",
             "watch.jsonl": "monitor.jsonl"}  # fmt: skip
"""Files of earlier versions, which take their new names when a run is continued."""
_PLACES = {
    r"base|editing_base|gguf|teachers\.\d+\.adapter": TEACHERS, r"data\.(generation|editing)|teachers\.\d+\.data": DATA,
    r"student\.init|fast\.adapter": TEACHERS,
}  # fmt: skip
"""Keys that say where something is, and the record of what it is: with that it may lie elsewhere."""


class RunDirectory:
    """The output folder of one recipe, with its `checkpoints` and its `logger`.

    Where the run `moved`, that is began with its base, teachers or data at other places, `recipe.yaml` is written by
    `settle` alone: once their fingerprints are compared.
    """

    def __init__(self, output: str | Path, recipe: Recipe) -> None:
        self.path, self.recipe = Path(output), recipe
        with disk_errors(self.path):
            _refuse_other(self.path, recipe)
            for name in ("", "checkpoints", "samples"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.path / ".lock")
            if (self.path / "recipe.yaml").is_file():
                _refuse_other(self.path, recipe)  # whoever held the lock may have trained
            for old, new in OLD_NAMES.items():
                if (self.path / old).is_file() and not (self.path / new).exists():
                    (self.path / old).rename(self.path / new)
            if not _has_trained(self.path):
                for name in AT_START:
                    (self.path / name).unlink(missing_ok=True)
            self.moved = False
            if _has_trained(self.path):
                fields = recorded_recipe(self.path)
                self.moved = _placed(fields, recipe.resolved(), self.path) != fields
            if not self.moved:
                self.settle()
            for leftover in (self.path / "checkpoints").glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            remove_partial_files(self.path, below=False)
            remove_partial_files(self.path / "samples")
        self.checkpoints = CheckpointStore(self.path / "checkpoints", recipe.keep_last)
        self.logger = Logger(self.path, trackers_of(recipe, self.path))

    def settle(self) -> None:
        """Writes `recipe.yaml`."""
        with disk_errors(self.path):
            here = self.recipe.model_copy(update={"output": self.path.absolute()})
            known = "".join(f"# {line}\n" for line in self._plugins())
            write_atomic(self.path / "recipe.yaml", (known + here.to_yaml()).encode())

    @property
    def finished(self) -> bool:
        """Whether a run of at least as many steps, or one that monitor or validation ended, was exported here."""
        return is_finished(self.path, self.recipe)

    def finish(self, step: int, **facts: Any) -> None:
        """Marks the run as finished after `step` updates (its export already stands in the folder)."""
        write_json(self.path / FINISHED, {"step": step, **facts})
        self.close()

    def forget(self, step: int) -> None:
        """Drops what was saved and logged after a step."""
        self.checkpoints.forget(step)
        self.logger.forget(step)

    def diverged(self, step: int, lr: float) -> int:
        """Drops what came of update `step`, whose state gives NaN, and notes the learning rate: from the checkpoint
        before, whose step is returned (0: none), the run may go on with another `optimizer`."""
        self.forget(step - 1)
        for folder in numbered_folders(self.path / "checkpoints", "good"):
            if int(folder.name.removeprefix("good-")) >= step:
                shutil.rmtree(folder, ignore_errors=True)
        saved = numbered_folders(self.path / "checkpoints", "step")
        last = int(saved[-1].name.removeprefix("step-")) if saved else 0
        write_json(self.path / DIVERGED, {"notes": [*_notes(self.path), {"step": step, "from": last, "lr": lr}]})
        return last

    def sentences(self) -> list[str]:
        """What the model card says of updates that were not finite, and of plug-ins."""
        notes = _notes(self.path)
        rates = [*(note["lr"] for note in notes[1:]), self.recipe.optimizer.lr]
        return [f"Plug-in: {line}." for line in self._plugins()] + [
            f"After step {note['step']} the loss was not finite with optimizer.lr {note['lr']:g}; the run went on from "
            f"step {note['from']} with {f'{lr:g}' if lr != note['lr'] else 'other settings of the optimizer'}."
            for note, lr in zip(notes, rates)
        ]

    def _plugins(self) -> list[str]:
        """Which plug-ins the run had, and what each was, as they were recorded."""
        known = read_json(self.path / PLUGINS, "the record of plug-ins") if (self.path / PLUGINS).is_file() else {}
        return [f"{name}: {', then '.join(map(str, places))}" for name, places in known.items()]

    def close(self) -> None:
        """Closes the logs and frees the folder for another process."""
        self.logger.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_directory(output: str | Path, recipe: Recipe) -> None:
    """Refuses what making a `RunDirectory` would refuse, and makes nothing."""
    _refuse_other(Path(output), recipe)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """`RunDirectory.finished` of a folder that is not opened."""
    try:
        done = read_json(folder / FINISHED, "the mark")
    except UserError:
        return False
    step = done.get("step")
    ended = done.get("stopped") is True and recipe.monitor.rollback == "stop"
    ended = ended or done.get("patience") == (recipe.validation.patience or 0)
    enough = isinstance(step, int) and step >= recipe.steps
    return (ended or enough) and (folder / WEIGHTS).is_file()


def begun_recipe(folder: Path, here: Recipe) -> Recipe | None:
    """The recipe of the run that has trained in a folder, as `_recipe_there` has it; None without one, and for one
    that does not resolve here."""
    if not (folder / "recipe.yaml").is_file() or not _has_trained(folder):
        return None
    try:
        return _recipe_there(folder, here)
    except UserError:
        return None


def _has_trained(folder: Path) -> bool:
    """Whether a run got as far as its first checkpoint here, or a student stands here."""
    saved = any(path.is_dir() for kind in ("step", "good") for path in (folder / "checkpoints").glob(f"{kind}-*"))
    return saved or any((folder / name).exists() for name in (FINISHED, WEIGHTS))


def _is_of_first_write(path: Path) -> bool:
    """Whether a run that was killed, or met a full disk, before its recipe was written left this."""
    empty = path.name in ("checkpoints", "samples") and path.is_dir() and not any(path.iterdir())
    return empty or (path.name == START and path.is_dir()) or path.name == ".lock" or is_partial(path)


def _refuse_other(folder: Path, recipe: Recipe) -> None:
    """UserError for what is no run, and for the run of another recipe that has trained."""
    if not folder.is_dir() or all(map(_is_of_first_write, folder.iterdir())):
        return
    theirs = folder / "recipe.yaml"
    if not theirs.is_file() or not (folder / "checkpoints").is_dir():
        raise UserError(f"output folder {folder} holds files that are not a run of danceopd; choose another --output")
    if not _has_trained(folder):  # refused on its way to the first step, most likely: the next one may be mended
        return
    try:
        there = _recipe_there(folder, recipe).identity()
    except UserError as error:
        raise UserError(
            f"output folder {folder} holds another run, whose recipe does not resolve here ({error}); "
            "choose another --output"
        ) from None
    found = differences(there, recipe.identity())
    if _goes_on_after_nan(folder):
        found = [one for one in found if not one[0].startswith("optimizer.")]
    for key, old, new in found:
        learnt = "" if key == "base" else f", with --from {folder} to start at what that run learnt"
        raise UserError(
            f"output folder {folder} holds another run ({key} is {old!r} there and {new!r} here); "
            f"choose another --output{learnt}, or delete that folder to start anew"
        )


def _recipe_there(folder: Path, here: Recipe) -> Recipe:
    """The recipe of the run in a folder; what it recorded the fingerprints of is where `here` says that it is."""
    fields = _placed(recorded_recipe(folder), here.resolved(), folder)
    return Recipe(f"{folder / 'recipe.yaml'}", **fields)


def _placed(there: Any, here: Any, folder: Path, key: str = "") -> Any:
    """`there`, with the places of `here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        return {k: _placed(value, here.get(k), folder, f"{key}.{k}".lstrip(".")) for k, value in there.items()}
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [_placed(old, new, folder, f"{key}.{i}") for i, (old, new) in enumerate(zip(there, here))]
    record = next((record for keys, record in _PLACES.items() if re.fullmatch(keys, key)), None)
    if record is None or there == here or not (_is_place(key, there) and _is_place(key, here)):
        return there
    known = read_json(folder / record, "the record") if (folder / record).is_file() else {}
    if key == "student.init":
        return here if known.get("init") == init_sha256(here) else there
    return here if known.get("encoders" if key in ("base", "editing_base") else "teachers") else there


def _is_place(key: str, value: Any) -> bool:
    """Whether a value of `_PLACES` says where something is, not what: "scenes" and the bare base are no places."""
    named = key in ("base", "gguf") or (key.endswith(".adapter") and value != "base")
    return isinstance(value, str) and (named or os.path.isabs(value))


def init_sha256(init: str) -> str | None:
    """sha256 of the file that a student starts as; None where `student.init` is no path."""
    return file_sha256(inspect_adapter(init).file) if os.path.isabs(init) else None


def _notes(folder: Path) -> list[dict[str, Any]]:
    """What `RunDirectory.diverged` noted."""
    if not (folder / DIVERGED).is_file():
        return []
    try:
        notes = read_json(folder / DIVERGED, "the record")["notes"]
        return [{"step": int(one["step"]), "from": int(one["from"]), "lr": float(one["lr"])} for one in notes]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / DIVERGED} is damaged; delete it, and the run goes on with its optimizer") from None


def _goes_on_after_nan(folder: Path) -> bool:
    """Whether nothing was saved since updates that were not finite."""
    saved = numbered_folders(folder / "checkpoints", "step")
    newest = int(saved[-1].name.removeprefix("step-")) if saved else 0
    return any(newest <= note["from"] for note in _notes(folder)[-1:])


def differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: key, and what it is in each."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            found
            for name in dict.fromkeys([*there, *here])
            for found in differences(there.get(name), here.get(name), f"{key}.{name}".lstrip("."))
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here))
        return [found for i, (old, new) in pairs for found in differences(old, new, f"{key}.{i}")]
    return [] if there == here else [(key, there, here)]
