"""`ParquetTable`: a .parquet file goes in, rows come out; texts are in memory, pictures are read when a row is used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.common.messages import clipped
from danceopd.data.tables import Row, Table
from danceopd.errors import UserError

SCAN = 1 << 16  # rows made at a time in a scan
LARGEST_GROUP = 1 << 32
"""Bytes of pictures in a row group, which is read as a whole."""


class ParquetTable(Table):
    """A parquet file. A cell of a column with pictures inside is a function that reads it: bytes, a mapping or a list.

    Texts, numbers, and lists and mappings of texts are read at once; other columns, such as embeddings, are left out.
    """

    columns: list[str]

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f'reading {path} needs pyarrow; `pip install "danceopd[data]"`, or give a .csv or .jsonl'
            ) from None
        self.path, self._damage = path, (OSError, ValueError, pyarrow.ArrowException)
        try:
            self._file = parquet.ParquetFile(path)
            fields = list(self._file.schema_arrow)
            self._pictures = [field.name for field in fields if _has_bytes(field.type)]
            texts = [field.name for field in fields if field.name not in self._pictures and _is_plain(field.type)]
            self._texts = self._file.read(columns=texts)
            groups = self._file.metadata
            self._ends = np.cumsum([groups.row_group(i).num_rows for i in range(groups.num_row_groups)])
        except self._damage as error:
            raise self._unreadable(error) from None
        self._names, self._rows = texts, groups.num_rows
        self.columns = [field.name for field in fields if field.name in {*texts, *self._pictures}]
        self._group: dict[str, tuple[int, Any]] = {}  # of each column with pictures, the row group read last

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self._rows:
            raise IndexError(row)
        texts = {name: self._texts.column(i)[row].as_py() for i, name in enumerate(self._names)}
        return self._in_order(texts, row)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def scan(self) -> Iterator[Row | UserError]:
        for first in range(0, self._rows, SCAN):
            part = self._texts.slice(first, SCAN)
            values = [part.column(i).to_pylist() for i in range(len(self._names))]
            for row in range(first, min(first + SCAN, self._rows)):
                yield self._in_order({n: v[row - first] for n, v in zip(self._names, values)}, row)

    def _in_order(self, texts: Row, row: int) -> Row:
        return {
            name: partial(self._picture, name, row) if name in self._pictures else texts[name] for name in self.columns
        }

    def _picture(self, column: str, row: int) -> Any:
        number = int(np.searchsorted(self._ends, row, side="right"))
        if self._group.get(column, (-1, None))[0] != number:
            group = self._file.metadata.row_group(number)
            if group.total_byte_size > LARGEST_GROUP:
                raise UserError(
                    f"{self.where(row)} is in a row group of {group.total_byte_size / 1e9:.0f} GB, which is read as a "
                    "whole; write the file with row_group_size=100"
                )
            try:
                self._group[column] = number, self._file.read_row_group(number, columns=[column]).column(0)
            except self._damage as error:
                raise self._unreadable(error) from None
        return self._group[column][1][row - int(self._ends[number]) + len(self._group[column][1])].as_py()

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self.path} is not a readable parquet file ({clipped(str(error), 120)}); write it again")


def _has_bytes(kind: Any) -> bool:
    """Whether a column's type holds bytes, alone, in a mapping or in a list."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_plain(kind: Any) -> bool:
    """Whether a column's type is a text or a number, or a list or mapping of texts."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_text(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_text(kind.value_type)
    return not types.is_nested(kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)  # of bytes that no row has
