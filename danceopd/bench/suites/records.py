"""Reading a benchmark's data, from the user's copy or from the hub, into rows of text and paths of images.

Read are Arrow shards (`datasets.save_to_disk`, a hub dataset's files), parquet shards, and tables of text (.jsonl,
.json) beside their images. Texts are read at once. Images inside shards are extracted once below the cache folder, so
suites hand on paths and never hold a benchmark in memory. Errors name the file and the row.
`located` finds the user's copy, `downloaded` gets a dataset from the hub, `on_disk` says whether it is there already.
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

from danceopd.common.cache import cache_folder
from danceopd.common.files import partial_path
from danceopd.data.tables import JsonTable
from danceopd.errors import UserError

NOT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "prompts.json")
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.\w+")
_STEP = 64  # rows with images that are in memory at once


@dataclass(frozen=True)
class Row:
    """One row: its texts (`cells`) and `where` it is, for error messages.

    ``home``: the folder that its paths start from, or the shard that holds its images as row ``number``.
    """

    cells: dict[str, Any]
    where: str
    home: Path
    number: int | None = None

    def text(self, field: str) -> str:
        """The text of a field; UserError where there is none."""
        value = self.cells.get(field)
        if not isinstance(value, str) or not value.strip():
            shown = "has no field" if value is None else f"holds {value!r}, which is not text, in"
            raise UserError(f"{self.where} {shown} {field!r}; correct that row, or download the data again")
        return value.strip()

    def name(self, field: str) -> str:
        """The text of a field that becomes part of a file name."""
        return file_name(self.text(field), f"{self.where}: {field}")


def file_name(value: str, where: str) -> str:
    """The value, if it can be the name of a file; UserError otherwise."""
    if not re.fullmatch(r"[\w -][\w .()+=-]*", value):
        raise UserError(f"{where} is {value!r}, which cannot be a file name; use letters, digits, - and _")
    return value


def read_rows(path: Path, fields: Sequence[str], tables: Sequence[str] = ()) -> list[Row]:
    """All rows of a file or folder, with the columns named in ``fields``.

    In a folder: shards at any depth, else one table of text; those named in ``tables`` come first.
    """
    shards = _shards(path)
    if shards:
        return [row for shard in shards for row in _shard_rows(shard, path, fields)]
    return _table_rows(_table(path, tables))


def _shards(path: Path) -> list[Path]:
    """The Arrow or parquet files in order; UserError where one of several is missing."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".arrow", ".parquet") else []
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
        raise UserError(f"{lacking[0]} is missing{more}; the data is incomplete, download it again")
    return found


def _listed(state: Path) -> list[str]:
    """The shards that `datasets.save_to_disk` listed in its state.json."""
    try:
        return [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{state} does not list its shards; download the data again") from None


def _batches(shard: Path, columns: Iterable[str]) -> Iterator[Any]:
    """Record batches of a shard with those of the columns that it has."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'reading {shard} needs pyarrow; run `pip install "danceopd[data]"`') from None
    wanted = list(columns)
    try:
        if shard.suffix.lower() == ".parquet":
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
        raise UserError(f"{shard} is not a readable {shard.suffix[1:]} file ({reason}); download it again") from None


def _shard_rows(shard: Path, root: Path, fields: Sequence[str]) -> Iterator[Row]:
    shown, number = shard if shard == root else shard.relative_to(root), 0
    for batch in _batches(shard, fields):
        for cells in batch.to_pylist():
            yield Row(cells, f"{shown}, row {number + 1}", shard, number)
            number += 1


def extracted_images(rows: Sequence[Row], column: str, names: Sequence[str], suite: str) -> list[Path]:
    """The images inside shards as PNG files below the cache folder, one for each row, named by ``names``."""
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
    """The bytes of an image as `datasets` stores them, as PNG."""
    held = value.get("bytes") if isinstance(value, dict) else value
    if not held:
        raise UserError(f"{row.where} has no image in {column!r}; download the data again")
    try:
        with Image.open(io.BytesIO(held)) as image:
            if image.format == "PNG":
                return held
            out = io.BytesIO()
            image.convert("RGB").save(out, format="PNG")
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, TypeError):
        raise UserError(f"{row.where}: {column!r} is not an image; download the data again") from None


def _write(path: Path, content: bytes) -> None:
    part = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(
            f"cannot write {path} ({error.strerror}); set DANCEOPD_CACHE to a folder with room for the images"
        ) from None


def _table(path: Path, names: Sequence[str]) -> Path:
    """The one text table of a folder, or the file itself."""
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".json"):
            raise UserError(f"{path} is of an unknown kind; give .arrow, .parquet, .jsonl, .json or a folder of them")
        return path
    known = [path / name for name in names if (path / name).is_file()]
    others = [*sorted(path.glob("*.jsonl")), *sorted(path.glob("*.json"))]
    found = known[:1] or [file for file in others if file.name not in NOT_TABLES]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} holds no .arrow or .parquet shards and no .jsonl or .json table; download it again")
    raise UserError(f"{path} holds several tables ({', '.join(f.name for f in found)}); give the path of one")


def _table_rows(table: Path) -> list[Row]:
    """The rows of .jsonl (an object a line) or .json (one list of objects, or one object of objects by key)."""
    if table.suffix.lower() == ".jsonl":
        lines = JsonTable(table)
        return [Row(lines[n], lines.where(n), table.parent) for n in range(len(lines))]
    try:
        data = json.loads(table.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{table} is not readable JSON ({error}); download it again") from None
    pairs: Iterable[tuple[str, Any]] = (
        data.items() if isinstance(data, dict) else ((str(n + 1), v) for n, v in enumerate(data)) if data else ()
    )
    rows = []
    for key, cells in pairs:
        if not isinstance(cells, dict):
            raise UserError(f"{table}, entry {key} is not a JSON object; download the file again")
        more = {"key": key} if isinstance(data, dict) else {}
        rows.append(Row(more | cells, f"{table}, entry {key}", table.parent))
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a repeated key, of which `json` would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def any_case(path: Path) -> Path | None:
    """The file of that path, whatever the case of its ending (.jpg, .JPG); None where there is none."""
    kinds = dict.fromkeys((path.suffix, path.suffix.lower(), path.suffix.upper(), path.suffix.title()))
    with suppress(OSError):  # a name that is too long
        return next((found for kind in kinds if (found := path.with_suffix(kind)).is_file()), None)
    return None


def header_checked(path: Path, where: str) -> Path:
    """The path, if its header is that of an image; UserError names the row (`where`) otherwise."""
    found = any_case(path)
    if found is None:
        raise UserError(f"{where}: image {path} does not exist; download the data again")
    try:
        with Image.open(found):
            return found
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{where}: {path} is not an image; download it again") from None


def located(data: str | Path | None, needs: str) -> Path | None:
    """The path of the user's copy, None when none is given. UserError where it does not exist."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"data folder {path} does not exist; {needs}")
    return path


def on_disk(repo: str, patterns: Sequence[str]) -> Path | None:
    """The snapshot of a hub dataset that was downloaded before, or None; uses no network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except Exception:  # the client raises a dozen kinds
        return None
    return folder if any(True for pattern in patterns for _ in folder.rglob(pattern)) else None


def downloaded(repo: str, patterns: Sequence[str], needs: str) -> Path:
    """The snapshot of a hub dataset, downloaded if needed; UserError says how to get it otherwise."""
    from huggingface_hub import snapshot_download

    reason = ""
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns)))
    except Exception as error:  # the client raises a dozen kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    else:
        if any(True for pattern in patterns for _ in folder.rglob(pattern)):
            return folder
        reason = "it has none of the expected files"
    raise UserError(f"dataset {repo} is not here and could not be downloaded from the hub ({reason}); {needs}")


def revision(folder: Path) -> str | None:
    """The commit of a hub snapshot's folder; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None
