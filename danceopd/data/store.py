"""`Store`: encoded rows on disk by key, shared by all runs; tensors go in once and are read back one row at a time.

A row's key is a hash of everything its encoding depends on, so it is found again from whichever run, table or order.
Rows lie in safetensors shards with a checksum each, and are read memory-mapped. A shard appears by one rename under
a name of its own, so processes may write at the same time; at worst a row is stored twice. What is cut off, altered or
of another version is noticed before it is used: with one warning a shard, its faulty rows are encoded again. Where the
folder is read-only, new rows go to a temporary one for as long as the process lives.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danceopd.common.cache import READ_ONLY
from danceopd.common.files import DISK_FULL, fsync_path
from danceopd.common.messages import clipped
from danceopd.errors import UserError

_log = logging.getLogger("danceopd")
SHARD_BYTES, SHARD_ROWS = 1 << 28, 4096
"""A shard is written when it holds this much."""

UNREADABLE = (
    SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What reading a damaged shard, or one of another version, raises."""

Tensors = dict[str, Tensor]


class Store:
    """The rows in one folder, by key. Rows that another process adds are seen after `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spare: tempfile.TemporaryDirectory[str] | None = None  # for new rows, where the folder is read-only
        self._shards: dict[Path, Any] = {}  # open files
        self._rows: dict[str, tuple[Path, int]] = {}  # key -> its shard and checksum
        self._names: dict[str, list[str]] = {}  # key -> names of its tensors
        self._verified: set[str] = set()
        self._damaged: set[Path] = set()  # shards that were warned of
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that are new in the folder; damaged ones are removed with a warning."""
        folders = [self.folder, *([Path(self._spare.name)] if self._spare else [])]
        for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
            if path in self._shards or path in self._damaged:
                continue
            try:
                shard = safe_open(str(path), framework="pt")
                rows = json.loads((shard.metadata() or {})["rows"])
                found = {str(key): (path, int(crc)) for key, crc in rows.items()}
                names = list(shard.keys())
            except FileNotFoundError:  # another process has just removed it
                continue
            except UNREADABLE as error:
                self._warn(path, error)
                self._remove(path)
                continue
            self._shards[path] = shard
            new = {key: place for key, place in found.items() if key not in self._verified}
            self._names.update({key: [] for key in new})
            for name in names:
                if (key := name.partition("/")[0]) in new:
                    self._names[key].append(name)
            self._rows.update(new)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def is_intact(self, key: str, read: Callable[[Tensors], object] = lambda tensors: None) -> bool:
        """Whether the row is there, its checksum is right, and `read` takes it; otherwise it is forgotten, with a
        warning."""
        if key in self._verified or key not in self._rows:
            return key in self._verified
        path, crc = self._rows[key]
        try:
            tensors = self._read(key)
            if _checksum(tensors) != crc:
                raise ValueError("its checksum is another")
            read(tensors)
        except UNREADABLE as error:
            self._warn(path, error)
            del self._rows[key]
            if not any(place == path for place, _ in self._rows.values()):
                self._remove(path)
            return False
        self._verified.add(key)
        return True

    def row(self, key: str) -> Tensors:
        """The tensors of a row, memory-mapped; UserError when they are damaged, KeyError when not there."""
        if key not in self._rows:
            raise KeyError(key)
        if not self.is_intact(key):
            raise UserError(f"the cache {self.folder} was damaged while it was in use; run the same command again")
        return self._read(key)

    def add(self) -> StoreWriter:
        """A context with a function `add(key, tensors)`; all rows are on the disk when it ends."""
        return StoreWriter(self)

    def _read(self, key: str) -> Tensors:
        shard = self._shards[self._rows[key][0]]
        return {name.partition("/")[2]: shard.get_tensor(name) for name in self._names[key]}

    def _warn(self, path: Path, error: Exception) -> None:
        """One warning a shard."""
        if path not in self._damaged:
            reason = clipped(str(error), 120) or type(error).__name__
            _log.warning("%s is damaged (%s); its rows are encoded again", path, reason)
        self._damaged.add(path)

    def _remove(self, path: Path) -> None:
        """Delete a shard that holds no row that can be used."""
        self._shards.pop(path, None)
        with suppress(OSError):
            path.unlink()

    def spare(self) -> Path:
        """A temporary folder for new rows, since `folder` is read-only; said once."""
        if self._spare is None:
            self._spare = tempfile.TemporaryDirectory(prefix="danceopd-cache-")
            _log.warning("the cache %s is read-only; what is encoded now is kept in %s until the end of this command",
                         self.folder, self._spare.name)  # fmt: skip
        return Path(self._spare.name)


class StoreWriter:
    """Collects rows and writes them in shards; on an error, the rows so far are written."""

    def __init__(self, store: Store) -> None:
        self.store, self._tensors, self._rows, self._bytes = store, Tensors(), dict[str, int](), 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.flush()
        self.store.refresh()

    def __call__(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Add a row, unless its key is stored already."""
        if key in self.store or key in self._rows:
            return
        row = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        self._rows[key] = _checksum(row)
        self._tensors.update({f"{key}/{name}": value.clone() for name, value in row.items()})
        self._bytes += sum(value.nbytes for value in row.values())
        if self._bytes >= SHARD_BYTES or len(self._rows) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows as one shard."""
        if not self._rows:
            return
        name = f"{time.time_ns():x}-{os.getpid():x}-{next(iter(self._rows))[:8]}.safetensors"
        try:
            self._write(self.store.folder, name)
        except UserError as error:
            if getattr(error.__cause__, "errno", None) not in READ_ONLY:
                raise
            self._write(self.store.spare(), name)
        self._tensors, self._rows, self._bytes = {}, {}, 0

    def _write(self, folder: Path, name: str) -> None:
        part = folder / f".{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.touch()  # for an error with a number: safetensors' own has none
            save_file(self._tensors, part, metadata={"rows": json.dumps(self._rows)})
            fsync_path(part)
            os.replace(part, folder / name)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            code = getattr(error, "errno", None)
            full = code in DISK_FULL or f"os error {errno.ENOSPC}" in str(error)
            mend = "free some space there" if full else "allow writing there"
            raise UserError(
                f"the cache {folder} cannot be written ({getattr(error, 'strerror', None) or error}); {mend}, or set "
                "DANCEOPD_CACHE to another folder"
            ) from error


def _checksum(row: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(row):
        value = row[name].contiguous()
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        if value.numel():
            crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def missing(
    store: Store, keys: Iterable[str], read: Callable[[Tensors], object] = lambda tensors: None
) -> list[str]:
    """The `keys` that are not in the store, damaged there, or not what `read` takes, each once, in order."""
    return [key for key in dict.fromkeys(keys) if not store.is_intact(key, read)]
