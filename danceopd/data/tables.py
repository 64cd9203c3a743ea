"""`Table`: a .csv, .jsonl, .txt or .parquet file goes in, rows (dicts) come out one at a time; a million open at once.

CSV, JSONL and text files are memory-mapped and indexed by the byte at which each row begins (numpy; CSV by the parity
of its quotes, so that quoted newlines stay inside their row). Of a parquet file, the columns that are needed are copied
once into an Arrow file that can be mapped. Indices of large files are kept in the cache folder under the file's size
and time. `scan` streams all rows for checking; the rows are never held in a list.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.common.cache import cached_file, cached_index
from danceopd.errors import UserError

TABLES = (".csv", ".jsonl", ".parquet")
BLOCK = 1 << 26  # bytes indexed at a time
SCAN = 2048  # rows parsed at a time in a scan
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
        self._bounds = cached_index(path, self._index)

    @abstractmethod
    def _index(self) -> np.ndarray:
        """(rows, 2) int64: the first byte of each row, and the byte after its last."""

    def __len__(self) -> int:
        return len(self._bounds)

    def text(self, row: int) -> str:
        """The text of a row in the file, without its newline."""
        start, stop = self._bounds[row].tolist()
        try:
            return self._map[start:stop].decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.where(row)} is not text in UTF-8; save the file as UTF-8") from None

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
        while rows and not self._map[slice(*bounds[rows - 1].tolist())].strip():
            rows -= 1
        return bounds[:rows]

    def __getitem__(self, row: int) -> Row:
        return {"prompt": self.text(row)}


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
        start, stop = self._bounds[row].tolist()
        return self._object(row, self._map[start:stop])

    def _object(self, row: int, line: bytes) -> Row:
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{self.where(row)} is not text in UTF-8; save the file as UTF-8") from None
        except ValueError as error:
            raise UserError(f"{self.where(row)} is not valid JSON: {error}; mend that line") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.where(row)} is not a JSON object; write one {{...}} a line")
        return value

    def scan(self) -> Iterator[Row | UserError]:
        """Many lines are parsed as one array, which is faster; a block with an error in it, line by line."""
        for first in range(0, len(self), SCAN):
            bounds = self._bounds[first : first + SCAN].tolist()
            lines = [self._map[start:stop] for start, stop in bounds]
            try:
                values = json.loads(b"[[" + b"],[".join(lines) + b"]]")
            except ValueError:
                values = []
            if len(values) == len(lines) and all(len(v) == 1 and type(v[0]) is dict for v in values):
                yield from (value[0] for value in values)
                continue
            for row, line in enumerate(lines, first):
                try:
                    yield self._object(row, line)
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
        return dict(zip(self.columns, fields))

    def __getitem__(self, row: int) -> Row:
        return self._row(row, self._fields(row))

    def scan(self) -> Iterator[Row | UserError]:
        header, width = self.columns, len(self.columns)
        for first in range(0, len(self), SCAN):
            rows = range(first, min(first + SCAN, len(self)))
            try:
                block = self._map[int(self._bounds[first][0]) : int(self._bounds[rows[-1]][1])].decode()
                parsed = [fields for fields in csv.reader(io.StringIO(block, newline="\n"), strict=True) if fields]
            except (csv.Error, UnicodeDecodeError):
                parsed = []
            if len(parsed) == len(rows) and max(map(len, parsed)) <= width:
                for fields in parsed:
                    yield dict(zip(header, fields))
                continue
            for row in rows:
                try:
                    yield self[row]
                except UserError as error:
                    yield error


class ParquetTable(Table):
    """A parquet file, read through a memory-mapped Arrow file with the columns that are needed."""

    columns: list[str]

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f'reading {path} needs pyarrow; `pip install "danceopd[data]"`, or give a .csv or .jsonl'
            ) from None
        self.path = path
        try:
            with parquet.ParquetFile(path) as file:
                known = file.schema_arrow.names
                self.columns = [name for name in dict.fromkeys(columns) if name in known] or known

                def write(part: Path) -> None:
                    batches = file.iter_batches(batch_size=self._step, columns=self.columns)
                    schema = pyarrow.schema([file.schema_arrow.field(name) for name in self.columns])
                    with pyarrow.OSFile(str(part), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as out:
                        for batch in batches:
                            out.write_batch(batch.select(self.columns))

                self._rows = file.metadata.num_rows
                mapped = cached_file(path, f"{','.join(self.columns)}.arrow", write)
            self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(mapped)))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is not a readable parquet file: {error}") from None
        sizes = [self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)]
        self._ends = np.cumsum(sizes)
        self._batches: dict[int, Any] = {}

    _step = 1 << 16  # rows a batch

    def __len__(self) -> int:
        return self._rows

    def _batch(self, number: int) -> Any:
        if number not in self._batches:
            self._batches[number] = self._file.get_batch(number)  # mapped, not read
        return self._batches[number]

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self._rows:
            raise IndexError(row)
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batch(number)
        at = row - int(self._ends[number]) + batch.num_rows
        return {name: batch.column(i)[at].as_py() for i, name in enumerate(self.columns)}

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def scan(self) -> Iterator[Row | UserError]:
        for number in range(len(self._ends)):
            values = [column.to_pylist() for column in self._batch(number).columns]
            for row in zip(*values):
                yield dict(zip(self.columns, row))
