"""`Table`: a .csv, .jsonl or .txt file goes in, rows (dicts) come out one at a time; a million of them open at once.

Files are memory-mapped and indexed by the byte at which each row begins (numpy; CSV by the parity of its quotes, so
that quoted newlines stay inside their row). The index is made anew each time, in less than a second for a million rows,
so it is never that of another file. `scan` streams all rows for checking; the rows are never held in a list.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.common.messages import clipped
from danceopd.errors import UserError

TABLES = (".csv", ".jsonl", ".parquet")
BLOCK = 1 << 26  # bytes indexed at a time
SCAN = 2048  # rows parsed at a time in a scan
LONGEST = 1 << 20  # bytes of a row, far above any text encoder's limit
NEWLINE, QUOTE, COMMA, RETURN = b'\n",\r'
BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]


class Table(ABC):
    """Rows by number. `path` is how error messages name the table."""

    path: Path | str
    columns: list[str] | None = None  # None: each row has its own keys

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Row:
        """One row, parsed now; UserError where it does not parse, IndexError beyond the end."""

    @abstractmethod
    def where(self, row: int) -> str:
        """How error messages name a row: the file and the line."""

    def scan(self) -> Iterator[Row | UserError]:
        """All rows in order, each as the row or as the error in it."""
        for row in range(len(self)):
            try:
                yield self[row]
            except UserError as error:
                yield error


class InMemoryTable(Table):
    """Rows that are in memory, such as those made from synthetic scenes."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.path, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"


class LineTable(Table):
    """A memory-mapped text file whose rows begin at known bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._map: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._first = len(BOM) if self._map[: len(BOM)] == BOM else 0
        self._bounds = self._index()

    @abstractmethod
    def _index(self) -> np.ndarray:
        """(rows, 2) int64: the first byte of each row, and the byte after its last."""

    def __len__(self) -> int:
        return len(self._bounds)

    def text(self, row: int) -> str:
        """The text of a row in the file, without its newline."""
        try:
            return self._bytes(row).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.where(row)} is not text in UTF-8; save the file as UTF-8") from None

    def _bytes(self, row: int) -> bytes:
        start, stop = self._bounds[row].tolist()
        if stop - start > LONGEST:
            raise UserError(f"{self.where(row)} has {stop - start:,} bytes, more than any prompt; remove or shorten it")
        return self._map[start:stop]

    def where(self, row: int) -> str:
        return f"{self.path}, line {self._line(int(self._bounds[row][0]))}"

    def _line(self, byte: int) -> int:
        return 1 + sum(int((block[: max(0, byte - at)] == NEWLINE).sum()) for at, block in self._blocks() if at < byte)

    def _newlines(self) -> np.ndarray:
        """The byte after each line; the last line counts also without a newline."""
        found = [at + np.flatnonzero(block == NEWLINE) + 1 for at, block in self._blocks()]
        ends = np.concatenate([np.zeros(0, np.int64), *found])
        size = len(self._map)
        return ends if size == self._first or (len(ends) and ends[-1] == size) else np.append(ends, size)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for at in range(self._first, len(self._map), BLOCK):
            yield at, np.frombuffer(self._map, np.uint8, min(BLOCK, len(self._map) - at), at)

    def _between(self, ends: np.ndarray) -> np.ndarray:
        """(rows, 2) bounds of rows from the bytes after them, without the newline (`\\n` or `\\r\\n`)."""
        starts = np.concatenate([[self._first], ends[:-1]]) if len(ends) else ends
        if not len(ends):
            return np.zeros((0, 2), np.int64)
        data = np.frombuffer(self._map, np.uint8)
        stops = ends - (data[ends - 1] == NEWLINE)
        stops = stops - ((stops > starts) & (data[np.maximum(stops - 1, 0)] == RETURN))
        return np.stack([starts, stops], axis=1)


class TextTable(LineTable):
    """A prompt a line. Empty lines at the end are ignored; other empty lines are rows, and errors."""

    def _index(self) -> np.ndarray:
        bounds = self._between(self._newlines())
        rows = len(bounds)
        while rows and self._is_blank(*bounds[rows - 1].tolist()):
            rows -= 1
        return bounds[:rows]

    def _is_blank(self, start: int, stop: int) -> bool:
        return stop - start <= LONGEST and not self._map[start:stop].strip()

    def __getitem__(self, row: int) -> Row:
        text = self.text(row)
        if "\r" in text:
            raise UserError(
                f"{self.where(row)} has a carriage return inside, as files of old Macs end their lines; save the file "
                "with the line ends of Unix or Windows"
            )
        return {"prompt": text}


class JsonTable(LineTable):
    """A JSON object a line; lines of white space are ignored."""

    def _index(self) -> np.ndarray:
        bounds = self._between(self._newlines())
        if not len(bounds):
            return bounds
        data = np.frombuffer(self._map, np.uint8)
        starts = np.minimum(bounds[:, 0], len(data) - 1)
        blank = bounds[:, 0] == bounds[:, 1]
        for row in np.flatnonzero(~blank & (data[starts] <= ord(" "))):
            blank[row] = not self._map[slice(*bounds[row].tolist())].strip()
        return bounds[~blank]

    def __getitem__(self, row: int) -> Row:
        return self._object(row, self._bytes(row))

    def _object(self, row: int, line: bytes) -> Row:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{self.where(row)} is not text in UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            reason = clipped(str(error), 120)
            raise UserError(f"{self.where(row)} is not valid JSON: {reason}; mend that line") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.where(row)} is not a JSON object; write one {{...}} a line")
        return value

    def scan(self) -> Iterator[Row | UserError]:
        """Many lines are parsed as one array, which is faster; a block with an error in it, line by line."""
        for first in range(0, len(self), SCAN):
            bounds = self._bounds[first : first + SCAN].tolist()
            lines = [self._map[start:stop] for start, stop in bounds if stop - start <= LONGEST]
            try:
                values = json.loads(b"[[" + b"],[".join(lines) + b"]]")
            except (ValueError, RecursionError):
                values = []
            if len(values) == len(bounds) and all(len(v) == 1 and type(v[0]) is dict for v in values):
                yield from (value[0] for value in values)
                continue
            for row in range(first, first + len(bounds)):
                try:
                    yield self[row]
                except UserError as error:
                    yield error


class CsvTable(LineTable):
    """Comma-separated values under a header, quoted as RFC 4180 says."""

    columns: list[str]

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not len(self._bounds):
            raise UserError(f"{path} is empty; write a header line and rows below it")
        self.columns, self._bounds = self._fields(0), self._bounds[1:]
        twice = next((name for name, count in Counter(self.columns).items() if name and count > 1), None)
        if twice is not None:
            raise UserError(f"{path} has the column {clipped(twice, 60)!r} twice; rename or remove one")

    def _index(self) -> np.ndarray:
        """Bounds with the header's row: by the parity of quotes where all quotes are well placed, else by `csv`."""
        ends, odd = [np.zeros(0, np.int64)], 0
        for at, block in self._blocks():
            quotes, newlines = np.flatnonzero(block == QUOTE), np.flatnonzero(block == NEWLINE)
            before = np.searchsorted(quotes, newlines) + odd
            if not self._well_quoted(at, block, quotes[odd::2]):
                return self._by_reader()
            ends.append(at + newlines[before % 2 == 0] + 1)
            odd = (odd + len(quotes)) % 2
        if odd:
            return self._by_reader()
        found = np.concatenate(ends)
        if len(self._map) > self._first and not (len(found) and found[-1] == len(self._map)):
            found = np.append(found, len(self._map))
        bounds = self._between(found)
        return bounds[bounds[:, 0] < bounds[:, 1]]

    def _well_quoted(self, at: int, block: np.ndarray, opening: np.ndarray) -> bool:
        """Whether every opening quote begins a field or follows a quote; `csv` takes any other as a character."""
        before = block[np.maximum(opening - 1, 0)]
        fine = (before == COMMA) | (before == NEWLINE) | (before == QUOTE)
        if len(opening) and opening[0] == 0:
            fine[0] = at == self._first or self._map[at - 1] in b',\n"'
        return bool(fine.all())

    def _by_reader(self) -> np.ndarray:
        """The bounds as Python's csv module reads the file, line by line."""
        taken = self._first

        def lines() -> Iterator[str]:
            nonlocal taken
            self._map.seek(self._first)
            for line in iter(self._map.readline, b""):
                taken += len(line)
                yield line.decode("utf-8", "surrogateescape")

        ends, reader = [], csv.reader(lines(), strict=True)
        try:
            for _ in reader:
                ends.append(taken)
        except csv.Error as error:
            raise UserError(
                f"{self.path}, line {reader.line_num} is not valid CSV: {error}; mend that line"
            ) from None
        bounds = self._between(np.array(ends, np.int64))
        return bounds[bounds[:, 0] < bounds[:, 1]]

    def _fields(self, row: int) -> list[str]:
        try:
            return next(csv.reader([self.text(row)], strict=True))
        except (csv.Error, StopIteration) as error:
            raise UserError(f"{self.where(row)} is not valid CSV: {error}; mend that line") from None

    def _row(self, row: int, fields: list[str]) -> Row:
        if len(fields) > len(self.columns):
            raise UserError(f"{self.where(row)} has more fields than the header; quote commas")
        return dict(zip_longest(self.columns, fields))

    def __getitem__(self, row: int) -> Row:
        return self._row(row, self._fields(row))

    def scan(self) -> Iterator[Row | UserError]:
        header, width = self.columns, len(self.columns)
        for first in range(0, len(self), SCAN):
            rows = range(first, min(first + SCAN, len(self)))
            try:
                bounds = self._bounds[first : first + SCAN]
                if (bounds[:, 1] - bounds[:, 0]).max() > LONGEST:
                    raise csv.Error("a row is too long")
                block = self._map[int(self._bounds[first][0]) : int(self._bounds[rows[-1]][1])].decode()
                parsed = [fields for fields in csv.reader(io.StringIO(block, newline="\n"), strict=True) if fields]
            except (csv.Error, UnicodeDecodeError):
                parsed = []
            if len(parsed) == len(rows) and max(map(len, parsed)) <= width:
                for fields in parsed:
                    yield dict(zip_longest(header, fields))
                continue
            for row in rows:
                try:
                    yield self[row]
                except UserError as error:
                    yield error
