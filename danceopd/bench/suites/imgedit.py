"""The ``imgedit`` suite: the basic suite of ImgEdit-Bench (arXiv 2505.20275), 737 edits of nine edit types.

One question an item, with the rubric of its edit type (`imgedit_rubrics.py`): three numbers from 1 to 5. An item's
score is their mean, rounded to two decimals as in the official script; the overall score is the unweighted mean of the
category means, as in most published tables. Images lie as in the official code: `<key>.png`.
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

from danceopd.bench.judges.protocol import Answer, Question, Reads
from danceopd.bench.suites import imgedit_rubrics
from danceopd.bench.suites.judged import (
    FAILURES,
    failure,
    files_sha256,
    numbers_of,
    official_file,
    refuse_duplicates,
)
from danceopd.bench.suites.protocol import Item, JudgedSuite, Score, json_sha256
from danceopd.bench.suites.records import (
    Row,
    any_case,
    downloaded,
    header_checked,
    located,
    on_disk,
    read_rows,
    revision,
)
from danceopd.common.cache import cache_folder
from danceopd.common.messages import did_you_mean
from danceopd.data.images import picture
from danceopd.errors import UserError

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
"""The nine edit types in the order of the published tables, and their group."""
OLDER_NAMES = {"alter": "adjust"}
"""Edit types as the first version of the benchmark, and the copies that others made of it, call them."""
SIZE = 737
TABLES = ("basic_edit.json", "singleturn.json")
OFFICIAL_FILE = "prompts.json"
OFFICIAL_PLACES = (".", "Basic", "Benchmark/Basic")
READS = Reads(count=3, low=1, high=5)
ASPECT = "score"


@dataclass(frozen=True)
class EditScore(Score):
    """``value``: the mean of the three numbers, 1 to 5, which follow in the rubric's order."""

    adherence: float | None = None
    quality: float | None = None
    preservation: float | None = None


class Suite(JudgedSuite):
    """The suite. ``data``: the unpacked `Benchmark.tar`, its `singleturn` folder, or the table beside the images."""

    name = "imgedit"
    version = "1"
    needs = (
        f"run `hf download {REPO} {TAR} --repo-type dataset --local-dir ImgEdit && tar -xf ImgEdit/{TAR} -C ImgEdit` "
        "and give --data ImgEdit"
    )
    scale = {"editing": (1.0, 5.0)}
    share = {"editing": False}
    published = {"editing": SIZE}

    def __init__(self, data: str | Path | None = None, official_prompts: str | Path | None = None):
        self.official = None if official_prompts is None else _official_prompts(official_prompts)
        self.revision: str | None = None
        found = located(data, self.needs)
        if found is None:
            snapshot = downloaded(REPO, (TAR,), self.needs)
            self.revision = revision(snapshot)
            found = _unpacked(snapshot / TAR)
        self.data = found

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        return on_disk(REPO, (TAR,)) if data is None else super().here(data)

    @cached_property
    def items(self) -> list[Item]:
        """Every item; UserError for a faulty record or a missing image."""
        table = _table(self.data, self.needs)
        rows = read_rows(table, ())
        if not rows:
            raise UserError(f"{table} has no entries; {self.needs}")
        refuse_duplicates(((row.name("key"), row.where) for row in rows), "key")
        root = _image_root(self.data, rows[0])
        return [self._item(row, root) for row in rows]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """How it is asked and averaged, and which data it was."""
        texts = {kind: hashlib.sha256(self._prompt(kind).encode()).hexdigest() for kind in CATEGORIES}
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
                "texts_sha256": json_sha256([[i.key, i.category, i.prompt] for i in self.items]),
                "pictures_sha256": files_sha256(Path(str(i.source)) for i in self.items),
            },
        }

    def image_path(self, item: Item) -> str:
        """`<key>.png`."""
        return f"{item.key}.png"

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """One question, with the rubric of the item's edit type."""
        assert item.source is not None
        text = self._prompt(item.category).replace("<edit_prompt>", item.prompt)
        parts = (text, picture(item.source), picture(image))
        return [Question(f"{item.key}/{ASPECT}", ASPECT, parts, READS, facts=self.edit_facts(item))]

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> EditScore:
        """The mean of the three numbers."""
        if failed := failure((ASPECT,), answers):
            return EditScore(None, False, failed[1], failed[0])
        numbers = numbers_of(answers[ASPECT])
        value = round(sum(numbers) / len(numbers), 2)
        return EditScore(value, value == READS.high, answers[ASPECT].reasoning, "ok", *numbers)

    def _prompt(self, kind: str) -> str:
        return imgedit_rubrics.prompt(kind) if self.official is None else self.official[kind]

    def _item(self, row: Row, root: Path) -> Item:
        kind = row.text("edit_type")
        kind = OLDER_NAMES.get(kind, kind)
        if kind not in CATEGORIES:
            raise UserError(f"{row.where} has the edit_type {kind!r}{did_you_mean(kind, CATEGORIES)}")
        return Item(
            key=row.name("key"),
            capability="editing",
            group=CATEGORIES[kind],
            category=kind,
            prompt=row.text("prompt"),
            source=header_checked(root / row.text("id"), row.where),
        )


def _table(data: Path, needs: str) -> Path:
    """`basic_edit.json` or `singleturn.json`, which hold the same rows, at any depth."""
    if data.is_file():
        return data
    for name in TABLES:
        if found := sorted(data.rglob(name)):
            return found[0]
    raise UserError(f"{data} holds neither {TABLES[0]} nor {TABLES[1]}; {needs}")


def _image_root(data: Path, first: Row) -> Path:
    """The folder that the paths of the source images start from, found by the first of them."""
    path = first.text("id")
    if any_case(first.home / path):
        return first.home
    top = data if data.is_dir() else data.parent
    every = sorted(top.rglob(glob.escape(str(Path(path).with_suffix(""))) + ".*"))
    found = next((file for file in every if file.suffix.lower() == Path(path).suffix.lower()), None)
    if found is None:
        raise UserError(f"{first.where}: source image {path} is not below {top}; unpack {TAR} of {REPO} there")
    return found.parents[len(Path(path).parts) - 1]


def _unpacked(tar: Path) -> Path:
    """The tar's single-turn images and table, unpacked once below the cache folder."""
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


def _official_prompts(folder: str | Path) -> dict[str, str]:
    """The judge's nine prompts in `prompts.json` of the user's copy of the official code."""
    advice = "give the folder Benchmark/Basic of a copy of https://github.com/PKU-YuanGroup/ImgEdit"
    file = official_file(folder, OFFICIAL_FILE, OFFICIAL_PLACES, advice)
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        held = {OLDER_NAMES.get(kind, kind): text for kind, text in held.items()}
        return {kind: str(held[kind]) for kind in CATEGORIES}
    except KeyError as error:
        raise UserError(f"{file} has no prompt for {error}; use the file of the official repository") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); use the file of the official repository") from None
