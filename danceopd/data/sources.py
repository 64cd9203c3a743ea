"""`prompts_from`, `edits_from`: a data source of the recipe goes in, prompts or (instruction, source image) pairs out.

A source is "scenes" (synthetic scenes; "scenes:local", "scenes:counting,position" for some of its tasks), a .txt (a
prompt a line), a .csv, .jsonl or .parquet with named columns (`columns.py` says which is what), a folder of images with
same-named .txt files or a `metadata.csv`, `.jsonl` or `.parquet`, or "hub:owner/name[:config][:split]". A row is parsed
when it is read. `check` runs before a model is loaded: it tests every row's text and path, and the image headers of
those that the run will use. Errors name the file and the line.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from danceopd.common.messages import clipped
from danceopd.data.columns import INSTRUCTION, PROMPT, Layout, image_cells, is_text, no_column, numbered, role_of, shown
from danceopd.data.folders import FolderTable, HubTable, metadata_of, refuse_target_folder
from danceopd.data.images import ImageSource, Sources, each_source, image_size, missing_image, warn_once
from danceopd.data.parquet import ParquetTable
from danceopd.data.tables import TABLES, CsvTable, InMemoryTable, JsonTable, Row, Table, TextTable
from danceopd.errors import UserError
from danceopd.recipe.parts import Columns
from danceopd.worlds.scenes.rows import is_scenes, scene_rows

KNOWN = Columns()  # columns are told by their names
CHECKED_HEADERS = 1000
"""Image headers that `check` opens when it is not told which rows will be used, spread evenly."""


class Prompts(Sequence[str]):
    """The prompts of a table, each parsed when it is read. `columns` name columns that the table calls otherwise."""

    texts: tuple[str, ...] = PROMPT  # names of a text's column
    parts: tuple[str, ...] = ("text",)  # what a row always has
    alpha = False  # whether the model reads alpha channels
    held_out: Prompts | None = None  # rows that are never learnt from, where the source has such

    def __init__(self, table: Table, columns: Columns = KNOWN) -> None:
        self.table, self.named = table, columns
        self.has_columns = not isinstance(table, TextTable | FolderTable | InMemoryTable)
        self._mapped = self._needed(columns) if self.has_columns else {}
        self._home = os.path.dirname(table.path) if isinstance(table.path, Path) else ""
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._worded: Callable[[str], str] = str
        if not len(table):
            raise UserError(f"data source {table.path} has no rows; add some")
        if table.columns is not None:
            for role, name in self._mapped.items():
                if name not in table.columns:
                    raise UserError(f"{table.path} {no_column(table.columns, name, role)}")

    def _needed(self, columns: Columns) -> dict[str, str]:
        """Of the columns that the recipe names, those that are read here, by role."""
        named = {"prompt": columns.prompt, "target": columns.target}
        return {role: name for role, name in named.items() if name is not None}

    def worded(self, words: Callable[[str], str]) -> Prompts:
        """The same rows, whose texts, paraphrases and captions are `words` of what the table has."""
        found, held = copy.copy(self), self.held_out
        found._worded, found.held_out = words, held and held.worded(words)
        return found

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

    def column(self, row: int, what: str) -> str | None:
        """The name of a row's column for its "text", "source" or "target"; None where it has none."""
        return self._column(row, self.table[row], what)

    @property
    def roles(self) -> dict[str, str]:
        """What the columns of the first row are read as; empty where the data has none."""
        found = [(what, self.column(0, what)) for what in self.parts if self.has_columns]
        return {what: name for what, name in found if name is not None}

    def _column(self, row: int, cells: Row, what: str) -> str | None:
        """The column that the recipe names, else the one that says it by name or content; UserError: it cannot be told.
        """
        layout, mapped = self._layout(cells), self._mapped
        role = ("instruction" if "instruction" in mapped else "prompt") if what == "text" else what
        if role in mapped:
            if mapped[role] not in cells:
                raise UserError(f"{self.where(row)} {no_column(cells, mapped[role], role)}")
            return mapped[role]
        if what == "text":
            filled = (name for name in layout.texts if cells[name] not in (None, ""))
            return next(filled, next(iter(layout.texts), None))
        try:
            if what == "source":
                return layout.source(cells, mapped.get("target"))
            return layout.target(cells, self._source_column(row, cells))
        except ValueError as error:
            raise UserError(f"{self.where(row)} {error}") from None

    def _source_column(self, row: int, cells: Row) -> str | None:
        """The column that is no target, since it is the source."""
        return None

    def _layout(self, cells: Row) -> Layout:
        names = tuple(cells)
        if names not in self._layouts:
            self._layouts[names] = Layout.of(names, self.texts)
        return self._layouts[names]

    def target(self, row: int) -> ImageSource:
        """The target image of a row, or its path; UserError where the row has none."""
        found = self._images(row, self.table[row], "target")
        if len(found) > 1:
            raise UserError(f"{self.where(row)} has {len(found)} finished pictures, where one is wanted; keep one")
        return found[0]

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
        if not isinstance(found, list) or not all(is_text(one) and one.strip() for one in found):
            raise UserError(
                f"{self.where(row)}: paraphrases is {shown(value)}; give a list of texts, or one text with | between "
                "them"
            )
        return [self._worded(one.strip()) for one in found]

    def expanded(self, row: int) -> str | None:
        """The longer prompt in a row's column `expanded`, or None; UserError where it is no text."""
        value = self.table[row].get("expanded")
        if value is None or value == "":
            return None
        if not is_text(value) or not value.strip():
            raise UserError(f"{self.where(row)}: expanded is {shown(value)}, not text; mend that row")
        return self._worded(value.strip())

    def check_targets(self, rows: Iterable[int]) -> None:
        """UserError for the first of `rows` without a target image, or with a wrong one, by its header."""
        for row in sorted(set(rows)):
            image_size(self.target(row), self.where(row), self.alpha)

    def check(self, rows: Iterable[int] | None = None) -> None:
        """UserError for the first wrong row, which says how many more there are.

        Checks the texts and paths of all rows. What needs a file to be opened (image headers, the texts of a folder) is
        checked only for `rows`, those that the run will use, or without them for a thousand spread evenly.
        """
        first, count = None, 0
        if not isinstance(self.table, FolderTable | InMemoryTable):
            passes = self._quick_test()
            for row, cells in enumerate(self.table.scan()):
                fault = cells if isinstance(cells, UserError) else None
                if not isinstance(cells, UserError) and not passes(cells):
                    fault = self._fault(row, cells)
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
        known: dict[tuple[str, ...], str] = {}  # the column that says the text, by the names of a row's columns

        def passes(cells: Row) -> bool:
            names = tuple(cells)
            if names not in known:
                try:
                    column = self._column(0, cells, "text")
                except UserError:
                    return False
                if column is None:
                    return False
                known[names] = column
            value = cells[known[names]]
            return type(value) is str and value != "" and not value.isspace() and is_text(value)

        return passes

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
        """The text of a row."""
        column = self._column(row, cells, "text")
        if column is None:
            raise UserError(f"{self.where(row)} {no_column(cells, self.texts[0])}")
        value = cells[column]() if callable(cells[column]) else cells[column]
        if value is None or isinstance(value, str) and not value.strip():
            raise UserError(f"{self.where(row)}: {column} is empty; write it or remove the row")
        if not isinstance(value, str):
            raise UserError(f"{self.where(row)}: {column} is {shown(value)}, not text; mend that row")
        if not is_text(value):
            raise UserError(f"{self.where(row)}: {column} has half a character (a lone surrogate); write it again")
        return self._worded(value.strip())

    def _images(self, row: int, cells: Row, what: str) -> list[ImageSource]:
        """The "source" pictures of a row, or its "target", or their paths, in their order."""
        column = self._column(row, cells, what)
        if column is None:
            raise UserError(f"{self.where(row)} {no_column(cells, what)}")
        several = what == "source" and what not in self._mapped and column[-1:].isdigit()
        found = []
        for name in numbered(cells, column) if several else [column]:
            try:
                found += image_cells(cells[name], self._home)
            except ValueError as error:
                raise UserError(f"{self.where(row)}: {name} {error}") from None
        if len(found) > 1 and role_of(column) == "picture" and what not in self._mapped:
            warn_once("holds several pictures, read as the sources of one edit in their order", self.where(row))
        return found


class Edits(Prompts):
    """(instruction, source image or its path) pairs of a table; the image is not opened here.

    A row of several sources has a list of them in place of the one.
    """

    texts, parts = INSTRUCTION, ("text", "source")

    def __init__(self, table: Table, columns: Columns = KNOWN) -> None:
        super().__init__(table, columns)
        self._names: dict[tuple[str, str], frozenset[str]] = {}  # listings of folders, while all rows are checked

    def _needed(self, columns: Columns) -> dict[str, str]:
        text = columns.instruction or columns.prompt
        named = {"instruction": text, "source": columns.source, "target": columns.target}
        return {role: name for role, name in named.items() if name is not None}

    def _item(self, row: int, cells: Row) -> tuple[str, Sources]:
        found = self._images(row, cells, "source")
        return self._prompt(row, cells), found if len(found) > 1 else found[0]

    def _source_column(self, row: int, cells: Row) -> str | None:
        return self._column(row, cells, "source")

    def sizes(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of a row's sources in pixels, from their headers; UserError for a shape no family edits."""
        from danceopd.pipelines.editing import check_aspect  # late: it imports torch

        found, where = [], self.where(row)
        for picture in each_source(self[row][1]):
            found.append(image_size(picture, where, self.alpha))
            check_aspect(*found[-1], f"{where}: {clipped(str(picture), 160)}" if isinstance(picture, Path) else where)
        return found

    def _open(self, row: int) -> None:
        self.sizes(row)

    def _quick_test(self) -> Callable[[Row], bool]:
        passes, exists = super()._quick_test(), self._exists()
        return lambda cells: passes(cells) and exists(cells)

    def _exists(self) -> Callable[[Row], bool]:
        """A test of whether a row's image is in the listing of its folder."""
        names = self._names

        def exists(cells: Row) -> bool:
            try:
                column = self._column(0, cells, "source")
            except UserError:  # it cannot be told which it is
                return False
            value = None if column is None else cells[column]
            if type(value) is not str or str(column)[-1].isdigit() or value.lstrip().startswith("["):
                return callable(value)  # of several `_fault` looks at each
            folder, slash, name = value.rpartition(os.sep)
            if (slash, folder) not in names:
                names[slash, folder] = _names(os.path.join(self._home, folder + slash))
            return name in names[slash, folder]

        return exists

    def _fault(self, row: int, cells: Row) -> UserError | None:
        fault = super()._fault(row, cells)
        for path in self._images(row, cells, "source") if fault is None else ():
            if not isinstance(path, Path):
                continue
            try:
                path.stat()
            except (OSError, ValueError):
                return UserError(missing_image(path, self.where(row)))
        return fault

    def check(self, rows: Iterable[int] | None = None) -> None:
        try:
            super().check(rows)
        finally:
            self._names.clear()
        self._check_guesses()

    def _check_guesses(self) -> None:
        """UserError for a row whose only picture is in a column that in other rows, with a source, is the finished one.
        """
        finished = {name for layout in self._layouts.values() if layout.sources for name in layout.pictures}
        guesses = {names for names, layout in self._layouts.items() if layout.only_picture in finished}
        if not guesses or "source" in self._mapped:
            return
        for row, cells in enumerate(self.table.scan()):
            if isinstance(cells, dict) and tuple(cells) in guesses:
                raise UserError(
                    f"{self.where(row)} has no source: its {self._layout(cells).only_picture} is the finished picture "
                    "in other rows; add the source, or remove the row"
                )


def prompts_from(
    spec: str | Path, rows: int = 1024, seed: int = 0, check: bool = True, targets: bool = False,
    columns: Columns = KNOWN,
) -> Prompts:  # fmt: skip
    """The prompts of a data source: `rows` of them from "scenes" with `seed`, all of a file, folder or dataset.

    With `check` the rows are checked now. With `targets` the target images are read, too. `columns` says what a table
    calls its columns, where it does not use a known name.
    """
    if is_scenes(spec):
        return Prompts(InMemoryTable(str(spec), scene_rows(spec, "generation", rows, seed)))
    found = Prompts(_table(spec, images=targets), columns if targets else columns.model_copy(update={"target": None}))
    if check:
        found.check()
    return found


def edits_from(
    spec: str | Path, rows: int = 1024, seed: int = 0, check: bool = True, targets: bool = False,
    columns: Columns = KNOWN,
) -> Edits:  # fmt: skip
    """The (instruction, source image or its path) pairs of a data source; arguments as for `prompts_from`."""
    if is_scenes(spec):
        return Edits(InMemoryTable(str(spec), scene_rows(spec, "editing", rows, seed)))
    if Path(spec).suffix.lower() == ".txt" and Path(spec).is_file():
        raise UserError(f"{spec} holds prompts only; edits need a source image each: give a .csv, .jsonl or folder")
    if Path(spec).is_dir():
        refuse_target_folder(Path(spec))
    found = Edits(_table(spec, images=True), columns)
    if check:
        found.check()
    return found


def _table(spec: str | Path, images: bool) -> Table:
    if str(spec).startswith("hub:"):
        return HubTable(str(spec))
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f'data source {str(spec)!r} does not exist; give "scenes", a file, a folder or hub:owner/name')
    if path.is_dir():
        return _table(listed, images) if (listed := metadata_of(path)) else FolderTable(path, images)
    if not path.is_file():
        raise UserError(f"data source {path} is a pipe or a device; give a file or a folder")
    kinds: dict[str, Callable[[Path], Table]] = {
        ".txt": TextTable, ".jsonl": JsonTable, ".csv": CsvTable, ".parquet": ParquetTable
    }  # fmt: skip
    kind = path.suffix.lower()
    if kind not in kinds:
        raise UserError(f"data source {path} is of an unknown kind; give .txt, {', '.join(TABLES)} or a folder")
    return kinds[kind](path)


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()
