"""The run directory: what a merge writes, so that it can be followed, trusted and continued.

    recipe.yaml  data.json  teachers.json  metrics.jsonl  logs/
    samples/step-000050.png  validation.json  validation.png
    checkpoints/step-000050/{state.safetensors,meta.json,manifest.json}
    monitor.jsonl  monitor.json  checkpoints/good-000050/…         of a monitored run (labelfree/monitor.py)
    pytorch_lora_weights.safetensors  README.md  finished.json     of a finished one

Making a `RunDirectory` creates, continues or refuses the folder, and locks it. Nothing in it is pickled.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from danceopd.common.files import (
    disk_errors,
    is_partial,
    lock_file,
    remove_partial_files,
    write_atomic,
    write_json,
)
from danceopd.common.parse import read_json
from danceopd.errors import UserError
from danceopd.recipe.recipe import Recipe
from danceopd.run.checkpoints import CheckpointStore
from danceopd.run.logger import Logger

FINISHED, WEIGHTS = "finished.json", "pytorch_lora_weights.safetensors"
AT_START = ("data.json", "teachers.json", "validation.json", "validation.png", "monitor.json")
"""What a run writes as it begins, which is deleted where nothing was trained yet."""
OLD_NAMES = {"gap.json": "validation.json", "gap.png": "validation.png", "watch.json": "monitor.json",
             "watch.jsonl": "monitor.jsonl"}  # fmt: skip
"""Files of earlier versions, which take their new names when a run is continued."""


class RunDirectory:
    """The output folder of one recipe, with its `checkpoints` and its `logger`."""

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
            write_atomic(self.path / "recipe.yaml", recipe.to_yaml().encode())
            for leftover in (self.path / "checkpoints").glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            remove_partial_files(self.path, below=False)
            remove_partial_files(self.path / "samples")
        self.checkpoints = CheckpointStore(self.path / "checkpoints", recipe.keep_last)
        self.logger = Logger(self.path)

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


def begun_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run that has trained in a folder; None without one, and for one that does not resolve here."""
    if not (folder / "recipe.yaml").is_file() or not _has_trained(folder):
        return None
    try:
        return Recipe.from_yaml(folder / "recipe.yaml")
    except UserError:
        return None


def _has_trained(folder: Path) -> bool:
    """Whether a run got as far as its first checkpoint here, or a student stands here."""
    saved = any(path.is_dir() for kind in ("step", "good") for path in (folder / "checkpoints").glob(f"{kind}-*"))
    return saved or any((folder / name).exists() for name in (FINISHED, WEIGHTS))


def _is_of_first_write(path: Path) -> bool:
    """Whether a run that was killed, or met a full disk, before its recipe was written left this."""
    empty = path.name in ("checkpoints", "samples") and path.is_dir() and not any(path.iterdir())
    return empty or path.name == ".lock" or is_partial(path)


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
        there = Recipe.from_yaml(theirs).identity()
    except UserError as error:
        raise UserError(
            f"output folder {folder} holds another run, whose recipe does not resolve here ({error}); "
            "choose another --output"
        ) from None
    for key, old, new in differences(there, recipe.identity()):
        raise UserError(
            f"output folder {folder} holds another run ({key} is {old!r} there and {new!r} here); "
            "choose another --output, or delete that folder to start anew"
        )


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
