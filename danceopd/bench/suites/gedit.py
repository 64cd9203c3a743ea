"""The ``gedit`` suite: GEdit-Bench (Step1X-Edit, arXiv 2504.17761), judged by VIEScore.

606 edits of real photographs in English and as many in Chinese, eleven categories; one language a run. The overall
score is the unweighted mean of the category means. Subsets: `paper` are the six categories of DanceOPD's tables,
`intersection` the items that the benchmark's authors mark as answered by every model they compared. Pictures lie as
in the official code: `fullset/<task_type>/<language>/<key>.png`, the source beside it as `<key>_SRCIMG.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.question import Answer, Question
from danceopd.bench.suites import Item, viescore
from danceopd.bench.suites.fetch import fetched, located, on_disk, revision
from danceopd.bench.suites.records import Row, header_checked, kept_pictures, read_rows
from danceopd.bench.suites.rubric import JudgedSuite, pictures_sha256, refuse_twice, sha256_of
from danceopd.errors import UserError
from danceopd.sentences import nearest

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
"""The eleven, spelt as in the data, and what each changes."""
PAPER = ("subject-add", "subject-replace", "background_change", "style_change", "color_alter", "subject-remove")
"""The six of DanceOPD's tables, in their order."""
LANGUAGES = ("en", "cn")
SIZE = 606
"""Items a language in the whole benchmark."""
FIELDS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")
PICTURE = "input_image"


class Suite(JudgedSuite):
    """The suite. ``data``: a local copy (shards, or a table beside its pictures); ``language``: "en" or "cn"."""

    name = "gedit"
    version = "1"
    needs = f"run `hf download {REPO} --repo-type dataset --local-dir GEdit-Bench` and give --data GEdit-Bench (3.7 GB)"
    scale = {"editing": (0.0, 10.0)}
    share = {"editing": False}

    def __init__(
        self,
        data: str | Path | None = None,
        language: str = "en",
        official_prompts: str | Path | None = None,
    ):
        if language not in LANGUAGES:
            hint = "; GEdit-Bench calls Chinese cn" if language.startswith("zh") else nearest(language, LANGUAGES)
            raise UserError(f"suite gedit has no language {language!r}{hint}")
        self.language = language
        self.words = viescore.Words() if official_prompts is None else viescore.official_words(official_prompts)
        self.data = located(data, self.needs) or fetched(REPO, FILES, self.needs)

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        return on_disk(REPO, FILES[:2]) if data is None else super().here(data)

    @property
    def subsets(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """`fullset` is everything; `intersection` only where the data marks it."""
        marked = any("intersection" in item.tags for item in self.items)
        found: dict[str, tuple[str, ...]] = {"fullset": tuple(CATEGORIES), "paper": PAPER}
        if marked:
            found |= {"intersection": ("tag:intersection",), "paper, intersection": (*PAPER, "tag:intersection")}
        return found

    @cached_property
    def items(self) -> list[Item]:
        """Every item of the language; the pictures inside shards are written below the cache folder first."""
        rows = [row for row in map(_named, read_rows(self.data, FIELDS, TABLES)) if self._spoken(row)]
        if not rows:
            raise UserError(f"{self.data} has no row in language {self.language!r}; {self.needs}")
        refuse_twice(((row.name("key"), row.where) for row in rows), "key")
        marked = [_marked(row) is not None for row in rows]
        if any(marked) and not all(marked):
            raise UserError(f"{rows[marked.index(False)].where} has no field 'Intersection_exist'; mend that row")
        return [self._item(row, source) for row, source in zip(rows, self._sources(rows))]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """VIEScore's rules, how the items add up, and which data it was."""
        words = [[i.category, i.key, i.prompt] for i in self.items]
        return viescore.rules(self.words) | {
            "language": self.language,
            "overall": "unweighted mean of the category means",
            "subsets": "fullset: all; paper: DanceOPD's six categories; intersection: as marked in the data",
            "data": {
                "name": REPO,
                "revision": revision(self.data),
                "items": len(self.items),
                "complete": len(self.items) == SIZE,
                "texts_sha256": sha256_of(words),
                "pictures_sha256": pictures_sha256(Path(str(i.source)) for i in self.items),
            },
        }

    def place(self, item: Item) -> str:
        """`fullset/<task_type>/<language>/<key>.png`."""
        return f"fullset/{item.category}/{self.language}/{item.key}.png"

    def source_place(self, item: Item) -> str | None:
        """`fullset/<task_type>/<language>/<key>_SRCIMG.png`."""
        return f"fullset/{item.category}/{self.language}/{item.key}_SRCIMG.png"

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """SC and PQ."""
        facts = {"suite": self.name, "place": self.place(item), "instruction": item.prompt, "category": item.category}
        return viescore.questions(item, image, self.words, facts)

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> viescore.EditScore:
        """O, with its parts."""
        return viescore.verdict(answers)

    def _spoken(self, row: Row) -> bool:
        language = row.text("instruction_language")
        if language not in LANGUAGES:
            raise UserError(f"{row.where} is in language {language!r}; GEdit-Bench has en and cn")
        return language == self.language

    def _item(self, row: Row, source: Path) -> Item:
        category = row.text("task_type")
        if category not in CATEGORIES:
            raise UserError(f"{row.where} has the task_type {category!r}{nearest(category, CATEGORIES)}")
        tags = [self.language]
        tags += ["paper"] if category in PAPER else []
        tags += ["intersection"] if _marked(row) else []
        return Item(
            key=row.name("key"),
            capability="editing",
            group=CATEGORIES[category],
            category=category,
            prompt=row.text("instruction"),
            probe=None,
            source=source,
            target=None,
            task=None,
            tags=tuple(tags),
        )

    def _sources(self, rows: list[Row]) -> list[Path]:
        """The pictures to edit: out of the shards, or beside the table."""
        if rows[0].number is not None:
            return kept_pictures(rows, PICTURE, [f"{row.name('key')}_{self.language}" for row in rows], self.name)
        return [header_checked(_beside(row), row.where) for row in rows]


TABLES = ("info.jsonl", "metadata.jsonl", "gedit_edit.json")


def _named(row: Row) -> Row:
    """A row in the names of the official data; UniWorld's table has others and keeps the language in its path."""
    if "task_type" in row.cells or "edit_type" not in row.cells:
        return row
    parts = row.text("id").split("/")
    language = parts[-2] if len(parts) > 1 else None
    more = {"instruction": row.cells.get("prompt"), "instruction_language": language}
    return Row(row.cells | {"task_type": row.cells["edit_type"]} | more, row.where, row.home, row.number)


def _marked(row: Row) -> bool | None:
    """Whether the item is in the intersection; None where the data does not say."""
    value = row.cells.get("Intersection_exist")
    if value is not None and value not in (True, False):
        raise UserError(f"{row.where} holds {value!r} in 'Intersection_exist', not true or false; mend that row")
    return None if value is None else bool(value)


def _beside(row: Row) -> Path:
    """The source of a table's row: the path it names, or `<key>_SRCIMG.png` in one of the usual places."""
    if row.cells.get(PICTURE) is not None:
        return row.home / row.text(PICTURE)
    name = f"{row.name('key')}_SRCIMG.png"
    usual = [row.home / name, row.home / "fullset" / row.text("task_type") / row.text("instruction_language") / name]
    return next((path for path in usual if path.is_file()), usual[-1])
