"""The ``folder`` suite: your own edits, judged by VIEScore as in the ``gedit`` suite.

The data is a table (.csv, .jsonl) with the columns `source` and `instruction` and optionally `target`, `mask`,
`category` and `key`; or a folder of images with same-named .txt instructions, laid out as for training
(danceopd/data/folders.py: with a `control` folder the images beside the texts are the targets); or one such folder a
category. Targets and masks are for the judge-free metrics; the judge never sees them. Images lie at `<key>.png`, or at
`<category>/<name>.png` where every category is a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.protocol import Answer, Question
from danceopd.bench.suites import viescore
from danceopd.bench.suites.judged import files_sha256, refuse_duplicates
from danceopd.bench.suites.protocol import Item, JudgedSuite, json_sha256
from danceopd.bench.suites.records import any_case, file_name, header_checked, located
from danceopd.data.folders import CONTROL
from danceopd.data.images import IMAGES, each_source
from danceopd.data.sources import Edits, edits_from
from danceopd.errors import UserError

TARGETS = ("target", "target_image", "edited_image", "output_image")
CATEGORY_COLUMNS = ("category", "task_type", "edit_type")
KEYS = ("key", "id")
CATEGORY = "edits"
"""The category of rows that name none."""


class Suite(JudgedSuite):
    """The suite. ``data``: the table or the folder."""

    name = "folder"
    version = "1"
    needs = "give --data a .csv or .jsonl with source and instruction columns, or a folder of images with .txt files"
    scale = {"editing": (0.0, 10.0)}
    share = {"editing": False}

    def __init__(self, data: str | Path | None = None, official_prompts: str | Path | None = None):
        found = located(data, self.needs)
        if found is None:
            raise UserError(f"suite folder has no data; {self.needs}")
        self.data = found
        self.prompts = viescore.judge_prompts(official_prompts)

    @cached_property
    def items(self) -> list[Item]:
        """Every edit, in the order of the rows or the names."""
        found = list(self._edits())
        refuse_duplicates(((item.key, where) for item, where in found), "edit")
        return [item for item, _ in found]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """VIEScore's rules, how scores are averaged, and which data it was."""
        texts = [[i.category, i.key, i.prompt] for i in self.items]
        return viescore.rules(self.prompts) | {
            "overall": "unweighted mean of the category means",
            "data": {
                "name": self.data.name,
                "items": len(self.items),
                "texts_sha256": json_sha256(texts),
                "pictures_sha256": files_sha256(Path(str(p)) for i in self.items for p in (i.source, *i.references)),
            },
        }

    def image_path(self, item: Item) -> str:
        """`<key>.png`, or `<category>/<name>.png` where every category is a folder."""
        return item.task["path"]

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """The questions SC and PQ, see `viescore`."""
        return viescore.questions(item, image, self.prompts, self.edit_facts(item))

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> viescore.EditScore:
        """O with its parts, see `viescore`."""
        return viescore.verdict(answers)

    def _edits(self) -> Iterator[tuple[Item, str]]:
        """Every edit, and where it is, for error messages."""
        if self.data.is_file():
            if self.data.suffix.lower() not in (".csv", ".jsonl"):
                raise UserError(f"{self.data} is neither .csv nor .jsonl; {self.needs}")
            yield from _rows_of(edits_from(self.data))
            return
        if any(self.data.glob("*.txt")):
            yield from _files_of(self.data, None)
            return
        inside = [f for f in sorted(self.data.iterdir()) if f.is_dir() and any(f.glob("*.txt"))]
        if not inside:
            raise UserError(f"{self.data} holds no .txt instructions; {self.needs}")
        for folder in inside:
            yield from _files_of(folder, file_name(folder.name, str(folder)))


def _rows_of(edits: Edits) -> Iterator[tuple[Item, str]]:
    """The edits of a table; the key is the row's own, else a hash of its source's path and its instruction."""
    home = Path(edits.table.path).parent
    for number in range(len(edits)):
        where, cells = edits.where(number), edits.table[number]
        instruction, sources = edits[number]
        own = _first(cells, KEYS)
        if own is None:
            picture = cells.get(edits.column(number, "source") or "")
            key = hashlib.sha256(f"{picture}\n{instruction}".encode()).hexdigest()[:12]
        else:
            key = file_name(str(own).strip(), f"{where}: key")
        given = {name: _first(cells, columns) for name, columns in (("target", TARGETS), ("mask", ("mask",)))}
        beside = {k: None if v is None else header_checked(home / str(v).strip(), where) for k, v in given.items()}
        category = file_name(str(_first(cells, CATEGORY_COLUMNS) or CATEGORY).strip(), f"{where}: category")
        yield _item(key, category, instruction, each_source(sources), beside, f"{key}.png"), where


def _files_of(folder: Path, category: str | None) -> Iterator[tuple[Item, str]]:
    """The edits of a folder of images with same-named texts."""
    edits = edits_from(folder)
    controlled = (folder / CONTROL).is_dir()
    for number in range(len(edits)):
        where = edits.where(number)
        instruction, sources = edits[number]
        stem = file_name(Path(where).stem, where)
        targets = [folder / f"{stem}{kind}" for kind in IMAGES] if controlled else []
        target = next((header_checked(path, where) for path in targets if any_case(path)), None)
        key = stem if category is None else f"{category}-{stem}"
        path = f"{stem}.png" if category is None else f"{category}/{stem}.png"
        beside = {"target": target, "mask": None}
        yield _item(key, category or CATEGORY, instruction, each_source(sources), beside, path), where


def _item(
    key: str, category: str, instruction: str, sources: Sequence[Any], beside: Mapping[str, Path | None], path: str
) -> Item:
    first, *others = map(Path, sources)
    return Item(
        key=key,
        capability="editing",
        group="edits",
        category=category,
        prompt=instruction,
        source=first,
        references=tuple(others),
        target=beside["target"],
        task={"path": path},
        mask=beside["mask"],
    )


def _first(cells: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    """The first of the columns that is not empty in the row."""
    return next((cells[c] for c in columns if cells.get(c) is not None and str(cells[c]).strip()), None)
