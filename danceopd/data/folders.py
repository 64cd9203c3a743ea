"""Two more tables: a folder of images with text files of the same names, and a dataset on the hub.

A folder is either flat (`name.png` is the source image of the instruction in `name.txt`), or it has a `control`
folder, as trainers lay out edits: then `control/name.png` is the source, and `name.png` beside the text is the
target image, which only objectives that train on images need. Only the listing is kept; texts are read when a row is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from danceopd.data.images import IMAGES
from danceopd.data.tables import Row, Table
from danceopd.errors import UserError

CONTROL = "control"


class FolderTable(Table):
    """The text files of a folder in the order of their names, with source and target images when `images` is set."""

    def __init__(self, path: Path, images: bool) -> None:
        self.path = self._folder = path
        self._sources: dict[str, str] = {}
        self._targets: dict[str, str] = {}
        texts, pictures = _listing(path)
        if images:
            controlled = (path / CONTROL).is_dir()
            self._targets = pictures if controlled else {}
            self._home = path / CONTROL if controlled else path
            self._sources = _listing(self._home)[1] if controlled else pictures
            lone = min(pictures.keys() - texts, default=None)
            if lone is not None:
                raise UserError(f"{path / pictures[lone]} has no instruction; write it into {path / lone}.txt")
            missing = sorted(texts - self._sources.keys())
            if missing:
                wanted = f"source image {self._home / missing[0]}.png" if controlled else "image of the same name"
                more = f" ({len(missing) - 1} more lack theirs)" if len(missing) > 1 else ""
                raise UserError(f"{path / missing[0]}.txt has no {wanted}; add it or remove the text{more}")
        self._stems = sorted(texts)

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, row: int) -> Row:
        stem, file = self._stems[row], self.where(row)
        try:
            with open(file, encoding="utf-8-sig") as text:
                found: Row = {"prompt": text.read()}
        except UnicodeDecodeError:
            raise UserError(f"{file} is not text in UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if self._sources:
            found["image"] = os.path.join(self._home.absolute(), self._sources[stem])
        if stem in self._targets:
            found["target"] = os.path.join(self._folder.absolute(), self._targets[stem])
        return found

    def where(self, row: int) -> str:
        return f"{self._folder / self._stems[row]}.txt"


def _listing(path: Path) -> tuple[set[str], dict[str, str]]:
    """The stems of text files, and the names of image files by stem."""
    texts: set[str] = set()
    pictures: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            stem, kind = os.path.splitext(entry.name)
            if kind == ".txt":
                texts.add(stem)
            elif kind.lower() in IMAGES:
                pictures[stem] = entry.name
    return texts, pictures


class HubTable(Table):
    """A dataset on the hub, `hub:owner/name[:config][:split]`, memory-mapped from the cache of `datasets`.

    A single word after the name is a configuration when the dataset has one of that name, else a split; the default
    split is `train`. Images are decoded when a row is read.
    """

    def __init__(self, spec: str) -> None:
        self.path = spec
        try:
            import datasets
        except ImportError:
            raise UserError(
                f'reading {spec} needs datasets; `pip install "danceopd[data]"`, or give a file or a folder'
            ) from None
        name, *rest = re.split(r":(?![^\[]*\])", spec.removeprefix("hub:"))  # a split may be sliced: test[:9]
        if "/" not in name or len(rest) > 2:
            raise UserError(f"data source {spec!r} is not hub:owner/name[:config][:split]; write it like that")
        try:
            if len(rest) == 1:
                rest = rest if rest[0] in datasets.get_dataset_config_names(name) else ["", *rest]
            config, split = [*rest, "", ""][:2]
            self._rows: Any = datasets.load_dataset(name, config or None, split=split or "train")
        except Exception as error:  # the library and its transport raise dozens of kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"data source {spec} does not load ({reason}); check the name and the connection") from None
        features = self._rows.features
        text = ("string", "large_string")
        texts = [key for key, kind in features.items() if getattr(kind, "dtype", "") in text]
        self._images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        self._texts = self._rows.select_columns(texts)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        """A row's texts; an image is a function that decodes it."""
        found: Row = dict(self._texts[row])
        for key in self._images:
            found[key] = lambda key=key: self._rows.select_columns([key])[row][key]
        return found

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def scan(self) -> Any:
        for row in range(len(self)):
            yield {**self._texts[row], **dict.fromkeys(self._images, _decode_later)}


def _decode_later() -> None:
    """In place of an image that a scan does not open."""
