"""Where the pictures of a bench lie: `images/<model>/<place>`, with the suite's official place of an item.

So a model's folder can be scored elsewhere as it is, and a folder made elsewhere can be scored here. Sources, targets
and masks lie once in `images/source`, `images/target` and `images/mask`. A picture takes its name by one rename:
what is there is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from danceopd.bench.suites import Item, picture, places
from danceopd.disk import disk_faults, part_of, replace_file
from danceopd.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What a picture made elsewhere may end in, where its official place ends in .png."""
BESIDE = {"source": "_SRCIMG", "target": "", "mask": ""}
"""What belongs to an item, and what follows its key in the file's name."""


def pixels_sha256(image: Image.Image) -> str:
    """Of an RGB picture's pixels, whatever file they come from."""
    return hashlib.sha256(image.tobytes()).hexdigest()


class Pictures:
    """The pictures below a bench's folder; paths are relative to it."""

    def __init__(self, folder: Path, suite: Any) -> None:
        self.folder, self.suite = folder, suite

    def path(self, model: str, item: Item) -> str:
        """Of a model's picture of an item, whether it is there or not."""
        return f"images/{model}/{self.suite.place(item)}"

    def found(self, model: str, item: Item) -> str | None:
        """The same where there is a picture, with the suffix it has; else None."""
        path = _with_any_suffix(self.folder / self.path(model, item))
        return None if path is None else path.relative_to(self.folder).as_posix()

    def beside(self, item: Item) -> dict[str, str | None]:
        """`source`, `target` and `mask` of an item, each a path or None."""
        place = PurePosixPath(self.suite.place(item))
        named = {what: place.with_name(f"{place.stem}{mark}.png") for what, mark in BESIDE.items()}
        return {
            what: f"images/{what}/{name}" if getattr(item, what) is not None else None for what, name in named.items()
        }

    def read(self, path: str) -> Image.Image:
        """A picture in RGB; UserError where the file is damaged."""
        return picture(self.folder / path)

    def save(self, path: str, image: Image.Image) -> str:
        """Write a picture; the hash of its pixels."""
        place = self.folder / path
        part = part_of(place)
        with disk_faults(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                image.save(part, format="PNG", compress_level=4)
                os.replace(part, place)
            except BaseException:
                with suppress(OSError):
                    part.unlink()
                raise
        return pixels_sha256(image)

    def keep_beside(self, items: Iterable[Item]) -> None:
        """Write the sources, targets and masks that are not there."""
        for item in items:
            for what, path in self.beside(item).items():
                if path is not None and not (self.folder / path).is_file():
                    self.save(path, picture(getattr(item, what)))

    def keep_records(self, model: str, item: Item) -> None:
        """What the official tree has beside a model's picture: small files, and a link to the source or a copy."""
        for name, text in self.suite.records(item).items() if hasattr(self.suite, "records") else ():
            file = self.folder / "images" / model / name
            if not file.is_file():
                with disk_faults(file):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    replace_file(file, text.encode())
        place, source = self.suite.source_place(item), self.beside(item)["source"]
        if place is None or source is None:
            return
        copy = self.folder / "images" / model / place
        if copy.exists():
            return
        with disk_faults(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.folder / source, copy)
            except OSError:  # a file system without links
                shutil.copyfile(self.folder / source, copy)

    def take(self, folders: Mapping[str, Path], items: Iterable[Item]) -> None:
        """Copy pictures made elsewhere to their places; one that has changed since is copied again.

        UserError where a folder has no picture of any item.
        """
        items = list(items)
        for model, folder in folders.items():
            there = 0
            for item in items:
                found = (_with_any_suffix(folder / place) for place in places(self.suite, item))
                made = next((file for file in found if file is not None), None)
                if made is None:
                    continue
                there += 1
                copy = self.folder / "images" / model / Path(self.suite.place(item)).with_suffix(made.suffix)
                if not _same_file(made, copy):
                    _copy(made, copy)
            if not there:
                raise UserError(
                    f"{folder} has none of the {len(items)} pictures that suite {self.suite.name} asks for; the first "
                    f"is looked for at {folder / self.suite.place(items[0])}"
                )


def _with_any_suffix(path: Path) -> Path | None:
    return next((found for s in (path.suffix, *SUFFIXES) if (found := path.with_suffix(s)).is_file()), None)


def _same_file(made: Path, copy: Path) -> bool:
    """By size and time, which a copy keeps."""
    if not copy.is_file():
        return False
    one, other = made.stat(), copy.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy(made: Path, copy: Path) -> None:
    part = part_of(copy)
    with disk_faults(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(made, part)
            os.replace(part, copy)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
