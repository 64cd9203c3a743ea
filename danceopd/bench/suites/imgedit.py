"""The ``imgedit`` suite: the basic suite of ImgEdit-Bench (arXiv 2505.20275), 737 edits of nine kinds.

One question an item, with the rubric of its kind (`imgedit_rubrics.py`): three numbers from 1 to 5. An item's score is
their mean, rounded to two decimals as the official script does; the overall score is the unweighted mean of the
category means, which is how most published tables add up. Pictures lie as in the official code: `<key>.png`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.question import Answer, Question, Reads
from danceopd.bench.suites import Item, imgedit_rubrics, picture
from danceopd.bench.suites.fetch import fetched, located, on_disk, revision
from danceopd.bench.suites.records import Row, header_checked, read_rows
from danceopd.bench.suites.rubric import (
    FAILURES,
    JudgedScore,
    JudgedSuite,
    failure,
    numbers_of,
    pictures_sha256,
    refuse_twice,
    sha256_of,
)
from danceopd.cache import cache_folder
from danceopd.errors import UserError
from danceopd.sentences import nearest

REPO, TAR = "sysuyy/ImgEdit", "Benchmark.tar"
CATEGORIES = {
    "add": "local",
    "adjust": "local",
    "extract": "global",
    "replace": "local",
    "remove": "local",
    "background": "global",
    "style": "global",
    "compose": "local",
    "action": "local",
}
"""The nine, in the order of the published tables, and what each changes."""
SIZE = 737
TABLES = ("basic_edit.json", "singleturn.json")
OFFICIAL_FILE = "prompts.json"
OFFICIAL_PLACES = (".", "Basic", "Benchmark/Basic")
READS = Reads(count=3, low=1, high=5)
ASPECT = "score"


@dataclass(frozen=True)
class EditScore(JudgedScore):
    """``value``: the mean of the three numbers, 1 to 5, which follow in the rubric's order."""

    adherence: float | None = None
    quality: float | None = None
    preservation: float | None = None


class Suite(JudgedSuite):
    """The suite. ``data``: the unpacked `Benchmark.tar`, its `singleturn` folder, or the table beside the pictures."""

    name = "imgedit"
    version = "1"
    needs = (
        f"run `hf download {REPO} {TAR} --repo-type dataset --local-dir ImgEdit && tar -xf ImgEdit/{TAR} -C ImgEdit` "
        "and give --data ImgEdit"
    )
    scale = {"editing": (1.0, 5.0)}
    share = {"editing": False}

    def __init__(self, data: str | Path | None = None, official_prompts: str | Path | None = None):
        self.official = None if official_prompts is None else _official(official_prompts)
        self.revision: str | None = None
        found = located(data, self.needs)
        if found is None:
            snapshot = fetched(REPO, (TAR,), self.needs)
            self.revision = revision(snapshot)
            found = _unpacked(snapshot / TAR)
        self.data = found

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        return on_disk(REPO, (TAR,)) if data is None else super().here(data)

    @cached_property
    def items(self) -> list[Item]:
        """Every item; UserError for a faulty record or a picture that is not there."""
        table = _table(self.data, self.needs)
        rows = read_rows(table, ())
        if not rows:
            raise UserError(f"{table} has no entries; {self.needs}")
        refuse_twice(((row.name("key"), row.where) for row in rows), "key")
        home = _home(self.data, rows[0])
        return [self._item(row, home) for row in rows]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """How it asks and adds up, and which data it was."""
        texts = {kind: hashlib.sha256(self._words(kind).encode()).hexdigest() for kind in CATEGORIES}
        source = f"danceopd {imgedit_rubrics.VERSION}" if self.official is None else "official"
        return {
            "prompts": {"source": source, "sha256": texts, "max_tokens": 1000},
            "resize": "none",
            "message order": {ASPECT: ["text", "source", "edit"]},
            "item": "mean of the three numbers, rounded to two decimals; numbers are taken as they are answered",
            "overall": "unweighted mean of the category means",
            "failures": FAILURES,
            "data": {
                "name": f"{REPO} (basic)",
                "revision": self.revision,
                "items": len(self.items),
                "complete": len(self.items) == SIZE,
                "texts_sha256": sha256_of([[i.key, i.category, i.prompt] for i in self.items]),
                "pictures_sha256": pictures_sha256(Path(str(i.source)) for i in self.items),
            },
        }

    def place(self, item: Item) -> str:
        """`<key>.png`."""
        return f"{item.key}.png"

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """One, with the rubric of the item's kind."""
        assert item.source is not None
        text = self._words(item.category).replace("<edit_prompt>", item.prompt)
        facts = {"suite": self.name, "place": self.place(item), "instruction": item.prompt, "category": item.category}
        parts = (text, picture(item.source), picture(image))
        return [Question(f"{item.key}/{ASPECT}", ASPECT, parts, READS, facts=facts)]

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> EditScore:
        """The mean of the three numbers."""
        if failed := failure((ASPECT,), answers):
            return EditScore(None, False, failed[1], failed[0])
        numbers = numbers_of(answers[ASPECT])
        value = round(sum(numbers) / len(numbers), 2)
        return EditScore(value, value == READS.high, answers[ASPECT].reasoning, "ok", *numbers)

    def _words(self, kind: str) -> str:
        return imgedit_rubrics.words(kind) if self.official is None else self.official[kind]

    def _item(self, row: Row, home: Path) -> Item:
        kind = row.text("edit_type")
        if kind not in CATEGORIES:
            raise UserError(f"{row.where} has the edit_type {kind!r}{nearest(kind, CATEGORIES)}")
        return Item(
            key=row.name("key"),
            capability="editing",
            group=CATEGORIES[kind],
            category=kind,
            prompt=row.text("prompt"),
            probe=None,
            source=header_checked(home / row.text("id"), row.where),
            target=None,
            task=None,
        )


def _table(data: Path, needs: str) -> Path:
    """`basic_edit.json` or `singleturn.json`, which hold the same, at any depth."""
    if data.is_file():
        return data
    for name in TABLES:
        if found := sorted(data.rglob(name)):
            return found[0]
    raise UserError(f"{data} holds neither {TABLES[0]} nor {TABLES[1]}; {needs}")


def _home(data: Path, first: Row) -> Path:
    """The folder that the pictures' paths start from, found by the first of them."""
    path = first.text("id")
    if (first.home / path).is_file():
        return first.home
    top = data if data.is_dir() else data.parent
    found = next(iter(sorted(top.rglob(glob.escape(path)))), None)
    if found is None:
        raise UserError(f"{first.where}: picture {path} is nowhere below {top}; unpack {TAR} of {REPO} there")
    return found.parents[len(Path(path).parts) - 1]


def _unpacked(tar: Path) -> Path:
    """The tar's single-turn pictures and table below the cache folder, unpacked once."""
    facts = tar.stat()
    name = hashlib.sha256(f"{tar.resolve()}\n{facts.st_size}".encode()).hexdigest()[:16]
    folder = cache_folder() / "suites" / "imgedit" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            with tarfile.open(tar) as packed:
                wanted = [member for member in packed if "singleturn" in Path(member.name).parts]
                packed.extractall(part, members=wanted, filter="data")
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir():  # unless another process was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{tar} cannot be unpacked below {folder.parent} ({reason}); unpack it elsewhere and give that as --data"
        ) from None
    return folder


def _official(folder: str | Path) -> dict[str, str]:
    """The nine prompts of `prompts.json` in the user's copy of the official code."""
    copies = [Path(folder).expanduser() / place / OFFICIAL_FILE for place in OFFICIAL_PLACES]
    file = next((copy for copy in copies if copy.is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} has no {OFFICIAL_FILE}; give the folder Benchmark/Basic of a copy of "
            "https://github.com/PKU-YuanGroup/ImgEdit"
        )
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return {kind: str(held[kind]) for kind in CATEGORIES}
    except KeyError as error:
        raise UserError(f"{file} has no prompt for {error}; take the file of the official repository") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); take the file of the official repository") from None
