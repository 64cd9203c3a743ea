"""Two more tables: a folder of images with text files of the same names, and a dataset on the hub.

In a folder, `name.png` is the source image of the instruction in `name.txt`. Where there is a folder `control` (or
`source`, `input`, …), as trainers lay out edits, `control/name.png` is the source, and `name.png` beside the text, or
in a folder `target` (`edited`, …), is the target image, which only objectives that train on images need. An edit of
several sources has `control/name_1.png`, `control/name_2.png` and so on. Folders may lie within folders. Only the
listing is kept; texts are read when a row is. A folder with a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` is
that table.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from danceopd.data.columns import role_of
from danceopd.data.images import IMAGES
from danceopd.data.tables import LONGEST, TABLES, Row, Table
from danceopd.errors import UserError

CONTROL = "control"
LISTED = tuple(f"metadata{kind}" for kind in TABLES)
"""Tables that list a folder's pictures in a column `file_name`."""


class FolderTable(Table):
    """The text files of a folder in the order of their names, with source and target images when `images` is set."""

    def __init__(self, path: Path, images: bool) -> None:
        self.path = self._folder = path
        texts, sources, targets, plain, control = _listing(path, images)
        self._key = "source" if control else "image"
        if control:  # pictures beside the texts are targets
            twice = min(targets.keys() & plain.keys(), default=None)
            if twice is not None:
                raise _two(path, targets[twice], plain[twice])
        first = _numbered(path, texts, sources) if control else {key: [file] for key, file in plain.items()}
        self._sources = first if images else {}
        self._targets = ({**plain, **targets} if control else targets) if images else {}
        if images:
            self._refuse_lone(texts, control)
        if not texts:
            others = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in TABLES]
            more = f"give {path / others[0]} itself" if others else "add one of the two"
            raise UserError(f"data source {path} has no rows: no .txt beside a picture, and no {LISTED[1]}; {more}")
        self._texts, self._stems = texts, sorted(texts)

    def _refuse_lone(self, texts: dict[str, str], control: str) -> None:
        """UserError for a text without a source, and for a picture without a text."""
        path, missing = self._folder, sorted(texts.keys() - self._sources.keys())
        if missing:
            wanted = "image of the same name"
            if control:
                wanted = f"source image {path / control / os.path.basename(missing[0])}.png"
            more = f" ({len(missing) - 1} more lack theirs)" if len(missing) > 1 else ""
            raise UserError(f"{path / texts[missing[0]]} has no {wanted}; add it or remove the text{more}")
        lone = min({**self._targets, **self._sources}.keys() - texts.keys(), default=None)
        if lone is not None:
            picture = self._sources[lone][0] if lone in self._sources else self._targets[lone]
            raise UserError(f"{path / picture} has no instruction; write it into {path / lone}.txt")

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, row: int) -> Row:
        stem, file = self._stems[row], self.where(row)
        try:
            if not os.path.isfile(file):
                raise UserError(f"{file} is not a file, or a link to none; write the text into it")
            with open(file, encoding="utf-8-sig") as text:
                found: Row = {"prompt": text.read(LONGEST + 1)}
        except UnicodeDecodeError:
            raise UserError(f"{file} is not text in UTF-8; save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        if len(found["prompt"]) > LONGEST:
            raise UserError(f"{file} has more than {LONGEST:,} characters, more than any prompt; shorten it")
        home = self._folder.absolute()
        if stem in self._sources:
            found[self._key] = [str(home / file) for file in self._sources[stem]]
            if len(found[self._key]) == 1:
                found[self._key] = found[self._key][0]
        if stem in self._targets:
            found["target"] = str(home / self._targets[stem])
        return found

    def where(self, row: int) -> str:
        return str(self._folder / self._texts[self._stems[row]])


def metadata_of(path: Path) -> Path | None:
    """The table in a folder that lists its pictures, if there is one; UserError where it is not clear what counts."""
    found = [path / name for name in LISTED if (path / name).is_file()]
    texts = any(path.glob("*.txt"))
    inside = None if found or texts else next((file for name in LISTED for file in path.glob(f"*/{name}")), None)
    if inside is not None:
        raise UserError(f"data source {path} has {inside} in a folder of its own; give {inside.parent}")
    if len(found) > 1 or found and texts:
        other = found[1].name if len(found) > 1 else ".txt files"
        raise UserError(f"data source {path} has {found[0].name} and {other}; give the one that counts by its own path")
    return found[0] if found else None


def refuse_target_folder(path: Path) -> None:
    """UserError for a folder of finished pictures whose sources lie in a folder beside it."""
    if role_of(path.absolute().name) != "target":
        return
    for beside in sorted(path.absolute().parent.iterdir()):
        if beside.is_dir() and role_of(beside.name) == "source":
            raise UserError(
                f"data source {path} holds finished pictures, and their sources are in {beside}; give {beside.parent}"
            )


def _listing(path: Path, images: bool) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, str], str]:
    """Texts, sources, targets and other pictures: the path below the folder by the path without folders that say a role
    and without suffix. And the first folder that says it holds sources, or nothing."""
    texts: dict[str, str] = {}
    pictures: dict[str, dict[str, str]] = {"source": {}, "target": {}, "picture": {}}
    control, seen = "", set[tuple[int, int]]()
    for place, folders, names in os.walk(path, followlinks=True):
        stat, below = os.stat(place), os.path.relpath(place, path)
        parts = [] if below == "." else below.split(os.sep)
        roles = {part: role_of(part) for part in parts}
        if (stat.st_dev, stat.st_ino) in seen or "mask" in roles.values():
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        role = next((role for role in ("source", "target") if role in roles.values()), "picture")
        if role == "source":
            control = control or below
        home = "/".join(part for part in parts if roles[part] not in ("source", "target"))
        for name in sorted(names):
            stem, kind = os.path.splitext(name)
            if name.startswith(".") or not (kind.lower() == ".txt" or images and kind.lower() in IMAGES):
                continue
            mine = texts if kind.lower() == ".txt" else pictures[role]
            key, file = f"{home}/{stem}".lstrip("/"), os.path.join(*parts, name)
            if key in mine:
                raise _two(path, mine[key], file)
            mine[key] = file
    return texts, pictures["source"], pictures["target"], pictures["picture"], control


def _numbered(path: Path, texts: dict[str, str], sources: dict[str, str]) -> dict[str, list[str]]:
    """The sources of each text: the one of its name, and then `name_1`, `name_2`, … unless that is a text's own."""
    found: dict[str, dict[int, str]] = {}
    for key, file in sources.items():
        stem, number = key, 0
        if key not in texts and (match := re.fullmatch(r"(.+)_(\d+)", key)) and match[1] in texts:
            stem, number = match[1], int(match[2]) + 1
        mine = found.setdefault(stem, {})
        if number in mine:
            raise _two(path, mine[number], file)
        mine[number] = file
    return {stem: [mine[number] for number in sorted(mine)] for stem, mine in found.items()}


def _two(path: Path, one: str, other: str) -> UserError:
    return UserError(f"{path / one} and {path / other} are two files for one row; keep one")


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
        self._images = [
            key for key, kind in features.items()
            if isinstance(kind, datasets.Image) or isinstance(getattr(kind, "feature", None), datasets.Image)
        ]  # fmt: skip
        self._texts, self.columns = self._rows.select_columns(texts), [*texts, *self._images]

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
