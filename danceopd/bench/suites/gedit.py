"""The ``gedit`` suite: GEdit-Bench (Step1X-Edit, arXiv 2504.17761), judged by VIEScore.

606 edits of real photographs in English and 606 in Chinese, in eleven categories; one language a run. The overall
score is the unweighted mean of the category means. Subsets: `paper` is the six categories of DanceOPD's tables,
`intersection` the items that the benchmark's authors mark as answered by every model they compared. Images lie as in
the official code: `fullset/<task_type>/<language>/<key>.png`, the source beside it as `<key>_SRCIMG.png`. The published
keys are unique within a task only: two photographs serve subject-remove and subject-replace under one key each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.protocol import Answer, Question
from danceopd.bench.suites import viescore
from danceopd.bench.suites.judged import files_sha256, refuse_duplicates
from danceopd.bench.suites.protocol import Item, JudgedSuite, json_sha256
from danceopd.bench.suites.records import (
    Row,
    any_case,
    downloaded,
    extracted_images,
    header_checked,
    located,
    on_disk,
    read_rows,
    revision,
)
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError

REPO = "stepfun-ai/GEdit-Bench"
FILES = ("*.arrow", "*.parquet", "*.json")
CATEGORIES = {
    "background_change": "global",
    "color_alter": "local",
    "material_alter": "local",
    "motion_change": "local",
    "ps_human": "local",
    "style_change": "global",
    "subject-add": "local",
    "subject-remove": "local",
    "subject-replace": "local",
    "text_change": "local",
    "tone_transfer": "global",
}
"""The eleven categories as the data spells them, and their group."""
PAPER = ("subject-add", "subject-replace", "background_change", "style_change", "color_alter", "subject-remove")
"""The six categories of DanceOPD's tables, in their order."""
LANGUAGES = ("en", "cn")
SIZE = 606
"""Items of one language in the whole benchmark."""
FIELDS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")
IMAGE = "input_image"


class Suite(JudgedSuite):
    """The suite. ``data``: a local copy (shards, or a table beside its images); ``language``: "en" or "cn"."""

    name = "gedit"
    version = "1"
    needs = f"run `hf download {REPO} --repo-type dataset --local-dir GEdit-Bench` and give --data GEdit-Bench (3.7 GB)"
    scale = {"editing": (0.0, 10.0)}
    share = {"editing": False}
    published = {"editing": SIZE}

    def __init__(
        self,
        data: str | Path | None = None,
        language: str = "en",
        official_prompts: str | Path | None = None,
    ):
        if language not in LANGUAGES:
            hint = "; GEdit-Bench calls Chinese cn" if language.startswith("zh") else did_you_mean(language, LANGUAGES)
            raise UserError(f"suite gedit has no language {language!r}{hint}")
        self.language = language
        self.prompts = viescore.judge_prompts(official_prompts)
        self.data = located(data, self.needs) or downloaded(REPO, FILES, self.needs)

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        return on_disk(REPO, FILES[:2]) if data is None else super().here(data)

    @property
    def subsets(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """`fullset` is every item; `intersection` is there only where the data marks it."""
        marked = any("intersection" in item.tags for item in self.items)
        found: dict[str, tuple[str, ...]] = {"fullset": tuple(CATEGORIES), "paper": PAPER}
        if marked:
            found |= {"intersection": ("tag:intersection",), "paper, intersection": (*PAPER, "tag:intersection")}
        return found

    @cached_property
    def items(self) -> list[Item]:
        """Every item of the language; images inside shards are first written below the cache folder."""
        rows = [row for row in map(_renamed, read_rows(self.data, FIELDS, TABLES)) if self._in_language(row)]
        if not rows:
            raise UserError(f"{self.data} has no row in language {self.language!r}; {self.needs}")
        refuse_duplicates(((f"{row.text('task_type')}/{row.name('key')}", row.where) for row in rows), "key")
        marked = [_in_intersection(row) is not None for row in rows]
        if any(marked) and not all(marked):
            raise UserError(f"{rows[marked.index(False)].where} has no field 'Intersection_exist'; correct that row")
        times = Counter(row.name("key") for row in rows)
        items = [self._item(row, times[row.name("key")] > 1) for row in rows]
        return [replace(item, source=source) for item, source in zip(items, self._sources(rows, items))]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """VIEScore's rules, how scores are averaged, and which data it was."""
        texts = [[i.category, i.key, i.prompt] for i in self.items]
        return viescore.rules(self.prompts) | {
            "language": self.language,
            "overall": "unweighted mean of the category means",
            "subsets": "fullset: all; paper: DanceOPD's six categories; intersection: as marked in the data",
            "data": {
                "name": REPO,
                "revision": revision(self.data),
                "items": len(self.items),
                "complete": len(self.items) == SIZE,
                "texts_sha256": json_sha256(texts),
                "pictures_sha256": files_sha256(Path(str(i.source)) for i in self.items),
            },
        }

    def image_path(self, item: Item) -> str:
        """`fullset/<task_type>/<language>/<key>.png`."""
        return f"fullset/{item.category}/{self.language}/{item.key}.png"

    def source_path(self, item: Item) -> str | None:
        """`fullset/<task_type>/<language>/<key>_SRCIMG.png`."""
        return f"fullset/{item.category}/{self.language}/{item.key}_SRCIMG.png"

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """The questions SC and PQ, see `viescore`."""
        return viescore.questions(item, image, self.prompts, self.edit_facts(item))

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> viescore.EditScore:
        """O with its parts, see `viescore`."""
        return viescore.verdict(answers)

    def _in_language(self, row: Row) -> bool:
        language = row.text("instruction_language")
        if language not in LANGUAGES:
            raise UserError(f"{row.where} is in language {language!r}; GEdit-Bench has en and cn")
        return language == self.language

    def _item(self, row: Row, shared: bool) -> Item:
        """The item of a row, without its source; `shared`: another task has one of the same key."""
        category = row.text("task_type")
        if category not in CATEGORIES:
            raise UserError(f"{row.where} has the task_type {category!r}{did_you_mean(category, CATEGORIES)}")
        tags = [self.language]
        tags += ["paper"] if category in PAPER else []
        tags += ["intersection"] if _in_intersection(row) else []
        return Item(
            key=row.name("key"),
            capability="editing",
            group=CATEGORIES[category],
            category=category,
            prompt=row.text("instruction"),
            tags=tuple(tags),
            shared=shared,
        )

    def _sources(self, rows: list[Row], items: list[Item]) -> list[Path]:
        """The source images: extracted from the shards, or beside the table."""
        if rows[0].number is not None:
            names = [f"{item.id.replace('/', '_')}_{self.language}" for item in items]
            return extracted_images(rows, IMAGE, names, self.name)
        return [header_checked(_source_of(row), row.where) for row in rows]


TABLES = ("info.jsonl", "metadata.jsonl", "gedit_edit.json")


def _renamed(row: Row) -> Row:
    """A row under the official field names; UniWorld's table has others and keeps the language in its path."""
    if "task_type" in row.cells or "edit_type" not in row.cells:
        return row
    parts = row.text("id").split("/")
    language = parts[-2] if len(parts) > 1 else None
    more = {"instruction": row.cells.get("prompt"), "instruction_language": language}
    return Row(row.cells | {"task_type": row.cells["edit_type"]} | more, row.where, row.home, row.number)


def _in_intersection(row: Row) -> bool | None:
    """Whether the item is in the intersection; None where the data does not say."""
    value = row.cells.get("Intersection_exist")
    if value is not None and value not in (True, False):
        raise UserError(f"{row.where} holds {value!r} in 'Intersection_exist', not true or false; correct that row")
    return None if value is None else bool(value)


def _source_of(row: Row) -> Path:
    """The source image of a table's row: the path it names, or `<key>_SRCIMG.png` in one of the usual places."""
    if row.cells.get(IMAGE) is not None:
        return row.home / row.text(IMAGE)
    name = f"{row.name('key')}_SRCIMG.png"
    usual = [row.home / name, row.home / "fullset" / row.text("task_type") / row.text("instruction_language") / name]
    return next((found for path in usual if (found := any_case(path))), usual[-1])
