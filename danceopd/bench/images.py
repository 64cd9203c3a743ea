"""The images of a bench on disk: `images/<model>/<path>`, where the path is that of the suite's official layout.

So a model's folder can be scored by the official code as it is, and a folder made elsewhere can be scored here. Source
images, targets and masks are stored once, in `images/source`, `images/target` and `images/mask`. An image gets its name
by one rename, so a file that exists is complete. `bench.json` says what the images are (`check_identity`).
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from danceopd.bench.metrics.masks import read_mask
from danceopd.bench.report.schema import rename_steps
from danceopd.bench.suites.protocol import DRIFT, Item, Suite
from danceopd.bench.suites.records import any_case
from danceopd.common.files import disk_errors, partial_path, write_atomic
from danceopd.data.images import picture
from danceopd.errors import UserError

MARK = "bench.json"
FILES = (".lock", "judge.jsonl", ".judge.jsonl.lock", "judge2.jsonl", ".judge2.jsonl.lock")
"""What an output folder may hold before its first bench: answers of an earlier one, which are used again."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes that an image made elsewhere may have where its official path ends in .png."""
INPUTS = {"source": "_SRCIMG", "target": "", "mask": ""}
"""The images that belong to an item -> what follows its key in the file's name."""


def check_identity(folder: Path, mine: dict[str, Any]) -> None:
    """UserError if a folder's `bench.json` is that of another bench; `mine` is what it would be.

    Models may be added. A folder of images made elsewhere may have moved. Older benches do not say their sources.
    """
    mark = folder / MARK
    if not mark.is_file():
        return
    try:
        known = json.loads(mark.read_text(encoding="utf-8"))
        before, now = dict(known.pop("models")), dict(mine["models"])
        rename_steps(known)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise UserError(
            f"output folder {folder} holds a bench whose {MARK} is damaged; choose another --output, or delete that "
            "folder"
        ) from None
    if left_out := [name for name in before if name not in now]:
        raise UserError(
            f"output folder {folder} holds a bench with further models ({', '.join(map(str, left_out[:3]))}); name "
            "them too, or choose another --output"
        )
    mine = {key: value for key, value in mine.items() if key != "models" and (key != "sources" or key in known)}
    other = [key for key in {**mine, **known} if known.get(key) != mine.get(key)]
    other += ["models"] if any(now[name] != old and not _moved(old, now[name]) for name, old in before.items()) else []
    if other:
        raise UserError(
            f"output folder {folder} holds another bench (other {', '.join(other)}); choose another --output, or "
            "delete that folder"
        )


def _moved(old: Any, new: str) -> bool:
    """Whether a folder of images is no longer at its old path; its images are known by their content."""
    return isinstance(old, str) and all(os.path.isabs(path) for path in (old, new)) and not os.path.exists(old)


def pixels_sha256(image: Image.Image) -> str:
    """sha256 of an RGB image's pixels, independent of the file format."""
    return hashlib.sha256(image.tobytes()).hexdigest()


class ImageStore:
    """The images below a bench's folder; all paths are relative to it."""

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.folder, self.suite = folder, suite

    def path(self, model: str, item: Item) -> str:
        """The path of a model's image of an item, whether it exists or not."""
        place = f"{DRIFT}/{item.key}.png" if item.group == DRIFT else self.suite.image_path(item)
        return f"images/{model}/{place}"

    def existing(self, model: str, item: Item) -> str | None:
        """The path of the image that is there, with its own suffix; None where there is none."""
        path = _with_any_suffix(self.folder / self.path(model, item))
        return None if path is None else path.relative_to(self.folder).as_posix()

    def inputs(self, item: Item) -> dict[str, str | None]:
        """The paths of an item's `source`, `target` and `mask`, None for those that it has not."""
        path = PurePosixPath(self.suite.image_path(item))
        named = {what: path.with_name(f"{path.stem}{mark}.png") for what, mark in INPUTS.items()}
        return {
            what: f"images/{what}/{name}" if getattr(item, what) is not None else None for what, name in named.items()
        }

    def read(self, path: str) -> Image.Image:
        """An image in RGB; UserError for a damaged file."""
        return picture(self.folder / path)

    def save(self, path: str, image: Image.Image) -> str:
        """Write an image as PNG; returns the hash of its pixels."""
        with _replacing(self.folder / path) as part:
            image.save(part, format="PNG", compress_level=4)
        return pixels_sha256(image)

    def save_inputs(self, items: Iterable[Item]) -> None:
        """Write the source images, targets and masks that are missing or older than their originals."""
        for item in items:
            for what, path in self.inputs(item).items():
                original = getattr(item, what)
                if path is not None and not _is_current(self.folder / path, original):
                    self.save(path, read_mask(original) if what == "mask" else picture(original))

    def save_extra_files(self, model: str, item: Item) -> None:
        """Write what the official layout has beside a model's image: small files, and the source (linked or copied)."""
        if item.group == DRIFT:
            return
        for name, text in self.suite.extra_files(item).items():
            file = self.folder / "images" / model / name
            if not file.is_file():
                with disk_errors(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(file, text.encode())
        path, source = self.suite.source_path(item), self.inputs(item)["source"]
        if path is None or source is None:
            return
        copy = self.folder / "images" / model / path
        if copy.exists():
            return
        with disk_errors(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.folder / source, copy)
            except OSError:  # a file system without links
                shutil.copyfile(self.folder / source, copy)

    def original(self, folder: Path, item: Item) -> Path | None:
        """The image of an item in a folder made elsewhere; None where there is none."""
        found = (_with_any_suffix(folder / path) for path in self.suite.image_paths(item))
        return next((file for file in found if file is not None), None)

    def check_folders(self, folders: Mapping[str, Path], items: Sequence[Item]) -> None:
        """UserError for a folder of images made elsewhere, by model name, without an image of any item."""
        for model, folder in folders.items():
            if not any(self.original(folder, item) for item in items):
                raise UserError(
                    f"--images {model}: {folder} has none of the {len(items)} images of suite {self.suite.name}; put "
                    f"the first at {folder / self.suite.image_path(items[0])}"
                )

    def import_folders(self, folders: Mapping[str, Path], items: Sequence[Item]) -> None:
        """Copy images made elsewhere, by model name, into the store, so that it holds what the folders hold now."""
        for model, folder in folders.items():
            for item in items:
                self._import(self.original(folder, item), self.folder / self.path(model, item))

    def _import(self, made: Path | None, path: Path) -> None:
        """Make `path`, with the suffix of the image `made`, a copy of it, and remove other copies."""
        copy = None if made is None else path.with_suffix(made.suffix.lower())
        with disk_errors(path):
            for suffix in {path.suffix, *SUFFIXES}:
                if (old := path.with_suffix(suffix)) != copy:
                    old.unlink(missing_ok=True)
        if made is not None and copy is not None and not (copy.is_file() and filecmp.cmp(made, copy, shallow=False)):
            with _replacing(copy) as part:
                shutil.copy2(made, part)


def _with_any_suffix(path: Path) -> Path | None:
    return next((found for s in (path.suffix, *SUFFIXES) if (found := any_case(path.with_suffix(s)))), None)


def _is_current(copy: Path, original: Image.Image | Path) -> bool:
    """Whether a copy is there, and no older than the file that it was made from."""
    if not copy.is_file():
        return False
    return not isinstance(original, Path) or original.stat().st_mtime_ns <= copy.stat().st_mtime_ns


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `file` at the end, and is deleted on an error."""
    part = partial_path(file)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, file)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
