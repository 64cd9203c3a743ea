"""The images of a bench on disk: `images/<model>/<path>`, where the path is that of the suite's official layout.

So a model's folder can be scored by the official code as it is, and a folder made elsewhere can be scored here. Source
images, targets and masks are stored once, in `images/source`, `images/target` and `images/mask`. An image gets its name
by one rename, so a file that exists is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from PIL import Image

from danceopd.bench.suites.protocol import Item, Suite
from danceopd.common.files import disk_errors, partial_path, write_atomic
from danceopd.data.images import picture
from danceopd.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes that an image made elsewhere may have where its official path ends in .png."""
INPUTS = {"source": "_SRCIMG", "target": "", "mask": ""}
"""The images that belong to an item -> what follows its key in the file's name."""


def pixels_sha256(image: Image.Image) -> str:
    """sha256 of an RGB image's pixels, independent of the file format."""
    return hashlib.sha256(image.tobytes()).hexdigest()


class ImageStore:
    """The images below a bench's folder; all paths are relative to it."""

    def __init__(self, folder: Path, suite: Suite) -> None:
        self.folder, self.suite = folder, suite

    def path(self, model: str, item: Item) -> str:
        """The path of a model's image of an item, whether it exists or not."""
        return f"images/{model}/{self.suite.image_path(item)}"

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
        """Write the source images, targets and masks that are missing."""
        for item in items:
            for what, path in self.inputs(item).items():
                if path is not None and not (self.folder / path).is_file():
                    self.save(path, picture(getattr(item, what)))

    def save_extra_files(self, model: str, item: Item) -> None:
        """Write what the official layout has beside a model's image: small files, and the source (linked or copied)."""
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

    def import_folders(self, folders: Mapping[str, Path], items: Iterable[Item]) -> None:
        """Copy images made elsewhere, by model name, into the store; changed ones are copied again.

        UserError for a folder without an image of any item.
        """
        items = list(items)
        for model, folder in folders.items():
            copied = 0
            for item in items:
                found = (_with_any_suffix(folder / path) for path in self.suite.image_paths(item))
                made = next((file for file in found if file is not None), None)
                if made is None:
                    continue
                copied += 1
                copy = self.folder / "images" / model / Path(self.suite.image_path(item)).with_suffix(made.suffix)
                if not _same_file(made, copy):
                    with _replacing(copy) as part:
                        shutil.copy2(made, part)
            if not copied:
                raise UserError(
                    f"--images {model}: {folder} has none of the {len(items)} images of suite {self.suite.name}; put "
                    f"the first at {folder / self.suite.image_path(items[0])}"
                )


def _with_any_suffix(path: Path) -> Path | None:
    return next((found for s in (path.suffix, *SUFFIXES) if (found := path.with_suffix(s)).is_file()), None)


def _same_file(made: Path, copy: Path) -> bool:
    """Whether size and modification time, which a copy keeps, are equal."""
    if not copy.is_file():
        return False
    one, other = made.stat(), copy.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


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
