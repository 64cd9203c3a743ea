"""`prompts_from`, `edits_from`: a data source of the recipe goes in, prompts or (instruction, source image) pairs out.

A source is "scenes" (synthetic scenes; "scenes:local", "scenes:counting,position" for some of its tasks), a .txt (a
prompt a line), a .csv, .jsonl or .parquet with named columns, a folder of images with same-named .txt files, or
"hub:owner/name[:config][:split]". Rows are lazy: a million of them open at once, and each is parsed when it is read.
`check` runs before a model is loaded: it tests every row's text, every path (by listing folders, not one file at a
time), and the image headers of the rows that the run will use. Errors name the file and the line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from danceopd.common.messages import did_you_mean
from danceopd.data.folders import FolderTable, HubTable
from danceopd.data.images import ImageSource, image_size
from danceopd.data.tables import TABLES, CsvTable, InMemoryTable, JsonTable, ParquetTable, Row, Table, TextTable
from danceopd.errors import UserError

PROMPT = ("prompt", "caption", "text")
INSTRUCTION = ("instruction", "edit_instruction", "edit_prompt", *PROMPT)
SOURCE = (
    "source", "source_image", "source_path", "input_image", "cond_image", "control_image", "control_path", "control",
    "image",
)  # fmt: skip
"""Where a table has both a source and an `image` column, the image is the target, which only `target` reads."""
TARGET = (
    "target", "target_image", "target_path", "edited_image", "edited_path", "output_image", "result", "output", "image",
)  # fmt: skip
"""The target image of a row, for objectives that train on images; of an edit, never the column of its source."""
REWORDINGS = ("paraphrases", "expanded")
"""Other texts of a row for label-free gates: paraphrases (a list, or one text with | between), and a longer version."""
CHECKED_HEADERS = 1000
"""Image headers that `check` opens when it is not told which rows will be used, spread evenly."""


class Prompts(Sequence[str]):
    """The prompts of a table, each parsed when it is read."""

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
        """One row's prompt, or a list of them; UserError where a row is wrong."""
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self._item(row, self.table[row])

    def _item(self, row: int, cells: Row) -> Any:
        return self._prompt(row, cells)

    def target(self, row: int) -> ImageSource:
        """The target image of a row, or its path; UserError where the row has none."""
        cells = self.table[row]
        return self._image(row, cells, self._targets(cells))

    def _targets(self, cells: Row) -> tuple[str, ...]:
        return TARGET

    def where(self, row: int) -> str:
        """The file and line of a row, for messages."""
        return self.table.where(row)

    def prompt(self, row: int) -> str:
        """A row's prompt or instruction alone."""
        return self._prompt(row, self.table[row])

    def paraphrases(self, row: int) -> list[str]:
        """The texts in a row's column `paraphrases`; UserError where it holds something else."""
        value = self.table[row].get("paraphrases")
        if value is None or value == "":
            return []
        found = value.split("|") if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
            raise UserError(
                f"{self.where(row)}: paraphrases is {value!r}; give a list of texts, or one text with | between them"
            )
        return [one.strip() for one in found]

    def expanded(self, row: int) -> str | None:
        """The longer prompt in a row's column `expanded`, or None; UserError where it is no text."""
        value = self.table[row].get("expanded")
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where(row)}: expanded is {value!r}, not text; mend that row")
        return value.strip()

    def check_targets(self, rows: Iterable[int]) -> None:
        """UserError for the first of `rows` without a target image, or with a wrong one, by its header."""
        for row in sorted(set(rows)):
            image_size(self.target(row), self.where(row))

    def check(self, rows: Iterable[int] | None = None) -> None:
        """UserError for the first wrong row, which says how many more there are.

        Checks the texts and paths of all rows. What needs a file to be opened (image headers, the texts of a folder) is
        checked only for `rows`, those that the run will use, or without them for a thousand spread evenly.
        """
        first, count = None, 0
        if not isinstance(self.table, FolderTable | InMemoryTable):
            passes = self._quick_test()
            for row, cells in enumerate(self.table.scan()):
                if type(cells) is dict and passes(cells):
                    continue
                fault = cells if isinstance(cells, UserError) else self._fault(row, cells)
                first, count = first or fault, count + (fault is not None)
        if first is None:
            every = max(1, -(-len(self) // CHECKED_HEADERS))
            for row in sorted(set(rows)) if rows is not None else range(0, len(self), every):
                try:
                    self._open(row)
                except UserError as error:
                    first, count = first or error, count + 1
        if first is not None:
            raise UserError(f"{first}{f' (and {count - 1} more rows are faulty)' if count > 1 else ''}")

    def _quick_test(self) -> Callable[[Row], bool]:
        """A quick test that most rows pass; those that fail are checked by `_fault`."""
        columns = self._present(self.columns)

        def passes(cells: Row) -> bool:
            for column in columns:
                value = cells.get(column)
                if value is not None:
                    return type(value) is str and value != "" and not value.isspace()
            return False

        return passes

    def _present(self, columns: tuple[str, ...]) -> list[str]:
        known = self.table.columns
        return [column for column in columns if known is None or column in known]

    def _fault(self, row: int, cells: Row) -> UserError | None:
        try:
            self._item(row, cells)
        except UserError as error:
            return error
        return None

    def _open(self, row: int) -> None:
        """Read a row, and the header of its image where it has one."""
        self[row]

    def _prompt(self, row: int, cells: Row) -> str:
        """The text in the first of `columns` that the row has."""
        value = self._cell(row, cells, self.columns)
        if not isinstance(value, str):
            raise UserError(f"{self.where(row)}: {_named(cells, self.columns)} is {value!r}, not text; mend that row")
        if not value.strip():
            column = _named(cells, self.columns)
            raise UserError(f"{self.where(row)}: {column} is empty; write it or remove the row")
        return value.strip()

    def _image(self, row: int, cells: Row, columns: tuple[str, ...]) -> ImageSource:
        """The image in the first of `columns` that the row has, or its path."""
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
            hint = did_you_mean(columns[0], [str(key) for key in cells])
            hint = hint.replace("did you mean", "is it called").replace("known:", "it has:")
            raise UserError(f"{self.where(row)} has no column {columns[0]!r}{hint}")
        return cells[column]


class Edits(Prompts):
    """(instruction, source image or its path) pairs of a table; the image is not opened here."""

    columns = INSTRUCTION

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._names: dict[tuple[str, str], frozenset[str]] = {}  # listings of folders, while all rows are checked

    def _item(self, row: int, cells: Row) -> tuple[str, ImageSource]:
        return self._prompt(row, cells), self._image(row, cells, SOURCE)

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

    def _open(self, row: int) -> None:
        self.size(row)

    def _quick_test(self) -> Callable[[Row], bool]:
        passes, exists = super()._quick_test(), self._exists()
        return lambda cells: passes(cells) and exists(cells)

    def _exists(self) -> Callable[[Row], bool]:
        """A test of whether a row's image is in the listing of its folder."""
        columns, names = self._present(SOURCE), self._names

        def exists(cells: Row) -> bool:
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

        return exists

    def _fault(self, row: int, cells: Row) -> UserError | None:
        fault = super()._fault(row, cells)
        if fault is None and isinstance(path := self._image(row, cells, SOURCE), Path) and not path.exists():
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
    """The prompts of a data source: `rows` of them from "scenes" with `seed`, all of a file, folder or dataset.

    With `check` the rows are checked now. With `targets` the target images are read, too.
    """
    if is_scenes(spec):
        tasks = scene_tasks(spec, "generation", "train", rows, seed)
        cells = [{"prompt": task.prompt, "target": partial(_rendered, task.scene)} for task in tasks]
        return Prompts(InMemoryTable(str(spec), cells))
    found = Prompts(_table(spec, PROMPT + REWORDINGS + (TARGET if targets else ()), images=targets))
    if check:
        found.check()
    return found


def edits_from(
    spec: str | Path, rows: int = 1024, seed: int = 0, check: bool = True, targets: bool = False
) -> Edits:
    """The (instruction, source image or its path) pairs of a data source; arguments as for `prompts_from`."""
    if is_scenes(spec):
        return Edits(InMemoryTable(str(spec), _made_edits(spec, rows, seed)))
    if Path(spec).suffix.lower() == ".txt" and Path(spec).is_file():
        raise UserError(f"{spec} holds prompts only; edits need a source image each: give a .csv, .jsonl or folder")
    found = Edits(_table(spec, INSTRUCTION + SOURCE + REWORDINGS + (TARGET if targets else ()), images=True))
    if check:
        found.check()
    return found


def is_scenes(spec: str | Path) -> bool:
    """Whether the source is "scenes" or some of its tasks, whose rows are generated and not read from a file."""
    return str(spec).partition(":")[0] == "scenes"


def scene_tasks(spec: str | Path, capability: str, split: str, count: int, seed: int) -> list[Any]:
    """`count` `Prompt`s or `Edit`s of `danceopd.worlds.scenes` from one split, of the tasks that `spec` names."""
    if capability != "editing":
        from danceopd.worlds.scenes.prompts import TAGS, prompts

        return prompts(split, count, seed, _only(spec, {tag: (tag,) for tag in TAGS}))
    from danceopd.worlds.scenes.edits import TASKS, edits, group_of

    known = {task: (task,) for task in TASKS}
    for task in TASKS:
        known[group_of(task)] = (*known.get(group_of(task), ()), task)
    return edits(split, count, seed, _only(spec, known))


def _made_edits(spec: str | Path, rows: int, seed: int) -> list[Row]:
    return [
        {"instruction": e.instruction, "source": _rendered(e.source), "target": partial(_rendered, e.target)}
        for e in scene_tasks(spec, "editing", "train", rows, seed)
    ]


def _rendered(scene: Any) -> Image.Image:
    from danceopd.worlds.scenes.render import render

    return Image.fromarray(render(scene))


def _only(spec: str | Path, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The tasks that `scenes:a,b` names; None for all of them."""
    _, _, names = str(spec).partition(":")
    if not names:
        return None
    chosen: tuple[str, ...] = ()
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"data source {str(spec)!r} names the task {name!r}, which does not exist{hint}")
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
    """The first of `columns` that is filled in the row, or else is there; None when it has none of them."""
    filled = next((c for c in columns if cells.get(c) is not None), None)
    return filled or next((c for c in columns if c in cells), None)


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()
