"""A benchmark's rows as people have them on disk.

Arrow shards (`datasets.save_to_disk`, a hub dataset's files), parquet shards, or a table of text (.jsonl, .json)
beside its pictures. Texts are read at once; pictures inside shards are written below the cache folder, each once, so
that every suite hands on paths and never holds a benchmark in memory. A fault names the file and the row.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.cache import cache_folder
from danceopd.disk import part_of
from danceopd.errors import UserError
from danceopd.tables import JsonTable

NOT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "prompts.json")
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.\w+")
_STEP = 64  # rows with pictures that are in memory at once


@dataclass(frozen=True)
class Row:
    """One row: its texts, what a sentence calls it, and where it is.

    ``home``: the folder that its paths start from, or the shard that holds its pictures, as row ``number``.
    """

    cells: dict[str, Any]
    where: str
    home: Path
    number: int | None = None

    def text(self, field: str) -> str:
        """A field that must hold text; UserError names the row."""
        value = self.cells.get(field)
        if not isinstance(value, str) or not value.strip():
            shown = "has no field" if value is None else f"holds {value!r}, which is not text, in"
            raise UserError(f"{self.where} {shown} {field!r}; mend that row, or fetch the data again")
        return value.strip()

    def name(self, field: str) -> str:
        """A field that becomes part of a file name."""
        return file_name(self.text(field), f"{self.where}: {field}")


def file_name(value: str, where: str) -> str:
    """The value, when it can be the name of a file; UserError otherwise."""
    if not re.fullmatch(r"[\w -][\w .()+=-]*", value):
        raise UserError(f"{where} is {value!r}, which cannot be a file's name; use letters, digits, - and _")
    return value


def read_rows(path: Path, fields: Sequence[str], tables: Sequence[str] = ()) -> list[Row]:
    """All rows of a file or folder, with the texts named in ``fields``.

    In a folder: shards at any depth, else one table of text, those named in ``tables`` before any other.
    """
    shards = _shards(path)
    if shards:
        return [row for shard in shards for row in _shard_rows(shard, path, fields)]
    return _table_rows(_table(path, tables))


def _shards(path: Path) -> list[Path]:
    """The arrow or parquet files, in order; UserError where one of several is missing."""
    if path.is_file():
        return [path] if path.suffix in (".arrow", ".parquet") else []
    every = sorted(path.rglob("*"))
    seen = [file for file in every if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    states = [file for file in seen if file.name == "state.json"]
    found = [state.parent / name for state in states for name in _listed(state)]
    found = found or [file for file in seen if file.suffix == ".arrow" and not file.name.startswith("cache-")]
    found = found or [file for file in seen if file.suffix == ".parquet"]
    wanted = set(found)
    for file in found:
        if match := _NUMBERED.fullmatch(file.name):
            stem, digits, count = match[1], len(match[2]), match[3]
            wanted |= {file.with_name(f"{stem}-{n:0{digits}}-of-{count}{file.suffix}") for n in range(int(count))}
    if lacking := sorted(file for file in wanted if not file.is_file()):
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise UserError(f"{lacking[0]} is missing{more}; the data is incomplete, fetch it again")
    return found


def _listed(state: Path) -> list[str]:
    """The shards that `datasets.save_to_disk` noted."""
    try:
        return [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{state} does not list its shards; fetch the data again") from None


def _batches(shard: Path, columns: Iterable[str]) -> Iterator[Any]:
    """Record batches with those of the columns that are there."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'reading {shard} needs pyarrow; `pip install "danceopd[data]"`') from None
    wanted = list(columns)
    try:
        if shard.suffix == ".parquet":
            with parquet.ParquetFile(shard) as file:
                there = [name for name in wanted if name in file.schema_arrow.names]
                yield from file.iter_batches(batch_size=_STEP, columns=there)
            return
        with pyarrow.memory_map(str(shard)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            for batch in batches:
                yield batch.select([name for name in wanted if name in batch.schema.names])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{shard} is not a readable {shard.suffix[1:]} file ({reason}); fetch it again") from None


def _shard_rows(shard: Path, root: Path, fields: Sequence[str]) -> Iterator[Row]:
    shown, number = shard if shard == root else shard.relative_to(root), 0
    for batch in _batches(shard, fields):
        for cells in batch.to_pylist():
            yield Row(cells, f"{shown}, row {number + 1}", shard, number)
            number += 1


def kept_pictures(rows: Sequence[Row], column: str, names: Sequence[str], suite: str) -> list[Path]:
    """The pictures inside shards as PNG files below the cache folder, one a row, by ``names``."""
    paths: list[Path] = []
    for row, name in zip(rows, names, strict=True):
        facts = row.home.stat()
        mark = f"{row.home.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}\n{column}"
        folder = cache_folder() / "suites" / suite / hashlib.sha256(mark.encode()).hexdigest()[:16]
        paths.append(folder / f"{name}.png")
    missing: dict[Path, dict[int, tuple[Row, Path]]] = {}
    for row, path in zip(rows, paths):
        if not path.is_file() and row.number is not None:
            missing.setdefault(row.home, {})[row.number] = (row, path)
    for shard, wanted in missing.items():
        number = 0
        for batch in _batches(shard, [column]):
            for index in range(batch.num_rows):
                if number + index in wanted:
                    row, path = wanted[number + index]
                    _write(path, _png(batch.column(0)[index].as_py() if batch.num_columns else None, row, column))
            number += batch.num_rows
    return paths


def _png(value: Any, row: Row, column: str) -> bytes:
    """The bytes of a picture as `datasets` keeps them, as PNG."""
    held = value.get("bytes") if isinstance(value, dict) else value
    if not held:
        raise UserError(f"{row.where} has no picture in {column!r}; fetch the data again")
    try:
        with Image.open(io.BytesIO(held)) as image:
            if image.format == "PNG":
                return held
            out = io.BytesIO()
            image.convert("RGB").save(out, format="PNG")
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, TypeError):
        raise UserError(f"{row.where}: {column!r} is not a picture; fetch the data again") from None


def _write(path: Path, content: bytes) -> None:
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(
            f"cannot write {path} ({error.strerror}); set DANCEOPD_CACHE to a folder with room for the pictures"
        ) from None


def _table(path: Path, names: Sequence[str]) -> Path:
    """The one table of text of a folder, or the file itself."""
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise UserError(f"{path} is of an unknown kind; give .arrow, .parquet, .jsonl, .json or a folder of them")
        return path
    known = [path / name for name in names if (path / name).is_file()]
    others = [*sorted(path.glob("*.jsonl")), *sorted(path.glob("*.json"))]
    found = known[:1] or [file for file in others if file.name not in NOT_TABLES]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} holds no .arrow or .parquet shards and no .jsonl or .json table; fetch the data again")
    raise UserError(f"{path} holds several tables ({', '.join(f.name for f in found)}); give the path of one")


def _table_rows(table: Path) -> list[Row]:
    """A JSON object a line; or one JSON list of objects, or one JSON object of them by their key."""
    if table.suffix == ".jsonl":
        lines = JsonTable(table)
        return [Row(lines[n], lines.where(n), table.parent) for n in range(len(lines))]
    try:
        data = json.loads(table.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise UserError(f"{table} is not readable JSON ({error}); fetch it again") from None
    pairs: Iterable[tuple[str, Any]] = (
        data.items() if isinstance(data, dict) else ((str(n + 1), v) for n, v in enumerate(data)) if data else ()
    )
    rows = []
    for key, cells in pairs:
        if not isinstance(cells, dict):
            raise UserError(f"{table}, entry {key} is not a JSON object; fetch the file again")
        more = {"key": key} if isinstance(data, dict) else {}
        rows.append(Row(more | cells, f"{table}, entry {key}", table.parent))
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError for a key that stands in it twice, of which JSON would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def header_checked(path: Path, where: str) -> Path:
    """The path, when it is a picture by its header; UserError names who asks for it."""
    if not path.is_file():
        raise UserError(f"{where}: picture {path} does not exist; fetch the data again")
    try:
        with Image.open(path):
            return path
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{where}: {path} is not a picture; fetch it again") from None
