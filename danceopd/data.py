"""Where the work comes from: prompts for generation, instructions with a source image for editing.

A source is "scenes" (the exact world; "scenes:local", "scenes:counting,position" for some of its tasks), a .txt (a
prompt a line), a .csv, .jsonl or .parquet with named columns, a folder of images with same-named .txt files, or
"hub:owner/name[:config][:split]". Rows are lazy: a million of them open in a moment and are read as they are drawn.
`check` looks at everything before a model is loaded: every row's text, every path (by listing folders, not by
asking for each file), and the image headers of the rows that will be drawn. A fault names its file and line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from .errors import UserError
from .folders import FolderTable, HubTable
from .images import Source, image_size, open_image
from .sentences import nearest
from .tables import TABLES, CsvTable, JsonTable, MadeTable, ParquetTable, Row, Table, TextTable

__all__ = ["Edits", "Prompts", "Source", "edits_from", "image_size", "is_made", "open_image", "prompts_from"]

PROMPT = ("prompt", "caption", "text")
INSTRUCTION = ("instruction", "edit_instruction", "edit_prompt", *PROMPT)
SOURCE = (
    "source", "source_image", "source_path", "input_image", "cond_image", "control_image", "control_path", "control",
    "image",
)  # fmt: skip
"""Where a table has both a source and an `image`, the image is the result, which only `target` reads."""
TARGET = (
    "target", "target_image", "target_path", "edited_image", "edited_path", "output_image", "result", "output", "image",
)  # fmt: skip
"""The finished picture of a row, for objectives that learn from pictures; of an edit, not what is its source."""
SAID = ("paraphrases", "expanded")
"""What a gate may ask instead: other wordings (a list, or one text with | between), and the words at greater length."""
LOOKED = 1000
"""Image headers that `check` opens when it is not told which rows will be drawn, spread evenly."""


class Prompts(Sequence[str]):
    """The prompts of a table, each read when it is asked for."""

    columns: tuple[str, ...] = PROMPT

    def __init__(self, table: Table) -> None:
        self.table = table
        self._home = os.path.dirname(table.path) if isinstance(table.path, Path) else ""
        if not len(table):
            raise UserError(f"data source {table.path} has no rows; add some")

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> Any: ...
    def __getitem__(self, row: int | slice) -> Any:
        """One row's prompt, or a list of them; UserError where the row is faulty."""
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self._item(row, self.table[row])

    def _item(self, row: int, cells: Row) -> Any:
        return self._words(row, cells)

    def target(self, row: int) -> Source:
        """The finished picture of a row, or its path; UserError where the row has none."""
        cells = self.table[row]
        return self._picture(row, cells, self._targets(cells))

    def _targets(self, cells: Row) -> tuple[str, ...]:
        return TARGET

    def where(self, row: int) -> str:
        """The file and line of a row."""
        return self.table.where(row)

    def words(self, row: int) -> str:
        """A row's prompt or instruction alone."""
        return self._words(row, self.table[row])

    def paraphrases(self, row: int) -> list[str]:
        """Other wordings in a row's column `paraphrases`; UserError where they are no texts."""
        value = self.table[row].get("paraphrases")
        if value is None or value == "":
            return []
        found = value.split("|") if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
            raise UserError(
                f"{self.where(row)}: paraphrases is {value!r}, no list of texts or texts with | between; mend that row"
            )
        return [one.strip() for one in found]

    def expanded(self, row: int) -> str | None:
        """The words at greater length, in a row's column `expanded`; UserError where it is no text."""
        value = self.table[row].get("expanded")
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where(row)}: expanded is {value!r}, not text; mend that row")
        return value.strip()

    def check_targets(self, rows: Iterable[int]) -> None:
        """UserError for the first of `rows` that has no finished picture, or a faulty one, by its header."""
        for row in sorted(set(rows)):
            image_size(self.target(row), self.where(row))

    def check(self, rows: Iterable[int] | None = None) -> None:
        """UserError for the first faulty row, which says how many more there are.

        The texts and paths of all rows; what takes opening a file (image headers, the texts of a folder) only of
        `rows`, those that will be drawn, or of a thousand spread evenly.
        """
        first, count = None, 0
        if not isinstance(self.table, FolderTable | MadeTable):
            plain = self._plainly()
            for row, cells in enumerate(self.table.scan()):
                if type(cells) is dict and plain(cells):
                    continue
                fault = cells if isinstance(cells, UserError) else self._fault(row, cells)
                first, count = first or fault, count + (fault is not None)
        if first is None:
            every = max(1, -(-len(self) // LOOKED))
            for row in sorted(set(rows)) if rows is not None else range(0, len(self), every):
                try:
                    self._look(row)
                except UserError as error:
                    first, count = first or error, count + 1
        if first is not None:
            raise UserError(f"{first}{f' (and {count - 1} more rows are faulty)' if count > 1 else ''}")

    def _plainly(self) -> Callable[[Row], bool]:
        """A quick test of whether nothing is wrong with a row; what it denies is left to `_fault`."""
        columns = self._present(self.columns)

        def plain(cells: Row) -> bool:
            for column in columns:
                value = cells.get(column)
                if value is not None:
                    return type(value) is str and value != "" and not value.isspace()
            return False

        return plain

    def _present(self, columns: tuple[str, ...]) -> list[str]:
        known = self.table.columns
        return [column for column in columns if known is None or column in known]

    def _fault(self, row: int, cells: Row) -> UserError | None:
        try:
            self._item(row, cells)
        except UserError as error:
            return error
        return None

    def _look(self, row: int) -> None:
        self[row]

    def _words(self, row: int, cells: Row) -> str:
        """The text in the first of `columns` that the row has."""
        value = self._cell(row, cells, self.columns)
        if not isinstance(value, str):
            raise UserError(f"{self.where(row)}: {_named(cells, self.columns)} is {value!r}, not text; mend that row")
        if not value.strip():
            column = _named(cells, self.columns)
            raise UserError(f"{self.where(row)}: {column} is empty; write it or remove the row")
        return value.strip()

    def _picture(self, row: int, cells: Row, columns: tuple[str, ...]) -> Source:
        """The picture in the first of `columns` that the row has."""
        value = self._cell(row, cells, columns)
        value = value() if callable(value) else value
        if isinstance(value, Image.Image):
            return value
        if not isinstance(value, str) or not value.strip():
            shown = "empty" if isinstance(value, str) else f"{value!r}, not a path"
            raise UserError(f"{self.where(row)}: {_named(cells, columns)} is {shown}; write it or remove the row")
        return Path(self._home, value.strip())

    def _cell(self, row: int, cells: Row, columns: tuple[str, ...]) -> Any:
        column = _named(cells, columns)
        if column is None:
            known = [str(k) for k in cells]
            wanted = nearest(columns[0], known).replace("did you mean", "is it called").replace("known:", "it has:")
            raise UserError(f"{self.where(row)} has no column {columns[0]!r}{wanted}")
        return cells[column]


class Edits(Prompts):
    """(instruction, source image or its path) pairs; a picture is opened by whoever draws the row."""

    columns = INSTRUCTION

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._names: dict[tuple[str, str], frozenset[str]] = {}  # of folders, while all rows are checked

    def _item(self, row: int, cells: Row) -> tuple[str, Source]:
        return self._words(row, cells), self._picture(row, cells, SOURCE)

    def _targets(self, cells: Row) -> tuple[str, ...]:
        return tuple(column for column in TARGET if column != _named(cells, SOURCE))

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) of a row's source image in pixels, from its header."""
        try:
            return image_size(self[row][1])
        except UserError as error:
            if str(error).startswith(str(self.table.path)):
                raise
            raise UserError(f"{self.where(row)}: {error}") from None

    def _look(self, row: int) -> None:
        self.size(row)

    def _plainly(self) -> Callable[[Row], bool]:
        plain, there = super()._plainly(), self._there()
        return lambda cells: plain(cells) and there(cells)

    def _there(self) -> Callable[[Row], bool]:
        """A test of whether the listing of its folder has a row's image."""
        columns, names = self._present(SOURCE), self._names

        def there(cells: Row) -> bool:
            for column in columns:
                value = cells.get(column)
                if value is None:
                    continue
                if type(value) is not str:
                    return callable(value)
                folder, slash, name = value.rpartition(os.sep)
                if (slash, folder) not in names:
                    names[slash, folder] = _names(os.path.join(self._home, folder + slash))
                return name in names[slash, folder]
            return False

        return there

    def _fault(self, row: int, cells: Row) -> UserError | None:
        fault = super()._fault(row, cells)
        if fault is None and isinstance(path := self._picture(row, cells, SOURCE), Path) and not path.exists():
            return UserError(f"{self.where(row)}: image {path} does not exist; check the path")
        return fault

    def check(self, rows: Iterable[int] | None = None) -> None:
        try:
            super().check(rows)
        finally:
            self._names.clear()


def prompts_from(
    spec: str | Path, rows: int = 1024, seed: int = 0, check: bool = True, targets: bool = False
) -> Prompts:
    """The prompts of a source; `rows` of them from "scenes", every one of a file's. Checked unless told not to.

    `targets`: its pictures are wanted, too.
    """
    if is_made(spec):
        drawn = made_tasks(spec, "generation", "train", rows, seed)
        return Prompts(MadeTable(str(spec), [{"prompt": p.prompt, "target": partial(_drawn, p.scene)} for p in drawn]))
    found = Prompts(_table(spec, PROMPT + SAID + (TARGET if targets else ()), images=targets))
    if check:
        found.check()
    return found


def edits_from(
    spec: str | Path, rows: int = 1024, seed: int = 0, check: bool = True, targets: bool = False
) -> Edits:
    """(instruction, source image or its path) pairs of a source. Checked unless told not to, in full by `check`.

    `targets`: the finished pictures are wanted, too.
    """
    if is_made(spec):
        return Edits(MadeTable(str(spec), _made_edits(spec, rows, seed)))
    if Path(spec).suffix.lower() == ".txt" and Path(spec).is_file():
        raise UserError(f"{spec} holds prompts only; edits need a source image each: give a .csv, .jsonl or folder")
    found = Edits(_table(spec, INSTRUCTION + SOURCE + SAID + (TARGET if targets else ()), images=True))
    if check:
        found.check()
    return found


def is_made(spec: str | Path) -> bool:
    """Whether the source is the exact world, whose rows are made and not read."""
    return str(spec).partition(":")[0] == "scenes"


def made_tasks(spec: str | Path, capability: str, split: str, count: int, seed: int) -> list[Any]:
    """The `Prompt`s or `Edit`s of the exact world that a source names, of one split of its scenes."""
    if capability != "editing":
        from .scenes.prompts import TAGS, prompts

        return prompts(split, count, seed, _only(spec, {tag: (tag,) for tag in TAGS}))
    from .scenes.edits import TASKS, edits, group_of

    known = {task: (task,) for task in TASKS}
    for task in TASKS:
        known[group_of(task)] = (*known.get(group_of(task), ()), task)
    return edits(split, count, seed, _only(spec, known))


def _made_edits(spec: str | Path, rows: int, seed: int) -> list[Row]:
    drawn = made_tasks(spec, "editing", "train", rows, seed)
    return [
        {"instruction": e.instruction, "source": _drawn(e.source), "target": partial(_drawn, e.target)} for e in drawn
    ]


def _drawn(scene: Any) -> Image.Image:
    from .scenes.render import render

    return Image.fromarray(render(scene))


def _only(spec: str | Path, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The tasks that `scenes:a,b` names; None for all of them."""
    _, _, names = str(spec).partition(":")
    if not names:
        return None
    chosen: tuple[str, ...] = ()
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            raise UserError(f"data source {str(spec)!r} names the task {name!r}, which is none{nearest(name, known)}")
        chosen += known[name]
    return chosen


def _table(spec: str | Path, columns: tuple[str, ...], images: bool) -> Table:
    if str(spec).startswith("hub:"):
        return HubTable(str(spec))
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f'data source {str(spec)!r} does not exist; give "scenes", a file, a folder or hub:owner/name')
    kind = path.suffix.lower()
    if path.is_dir():
        return FolderTable(path, images)
    if kind == ".parquet":
        return ParquetTable(path, columns)
    kinds: dict[str, type[TextTable | JsonTable | CsvTable]] = {
        ".txt": TextTable, ".jsonl": JsonTable, ".csv": CsvTable
    }  # fmt: skip
    if kind not in kinds:
        raise UserError(f"data source {path} is of an unknown kind; give .txt, {', '.join(TABLES)} or a folder")
    return kinds[kind](path)


def _named(cells: Row, columns: tuple[str, ...]) -> str | None:
    """The first of `columns` that the row fills, or else has."""
    filled = next((c for c in columns if cells.get(c) is not None), None)
    return filled or next((c for c in columns if c in cells), None)


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()
