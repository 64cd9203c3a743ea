"""The cache folder that runs share, and files in it that are made from other files.

`DANCEOPD_CACHE`, or `danceopd` in the user's cache folder. What lies there can always be made again; deleting the
folder is safe. Files appear by one rename, so processes may make the same one at the same time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from danceopd.disk import part_of

KEPT = 1 << 24
"""Bytes from which a file's index is worth keeping."""


def cache_folder() -> Path:
    """`DANCEOPD_CACHE`, else `danceopd` below `XDG_CACHE_HOME`, `LOCALAPPDATA` or `~/.cache`. It may not exist yet."""
    said = os.environ.get("DANCEOPD_CACHE")
    if said:
        return Path(said).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(root) if root else Path.home() / ".cache") / "danceopd"


def kept_index(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The index of a file, from the cache folder when the file is large and has not changed since."""
    if path.stat().st_size < KEPT:
        return make()

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, make())

    try:
        return np.load(kept_file(path, "rows.npy", write), mmap_mode="r")
    except (OSError, ValueError):  # no place for a cache, or what is there is damaged
        return make()


def kept_file(path: Path, kind: str, write: Callable[[Path], None]) -> Path:
    """A file made from `path` once, below the cache folder, under the path, size and time of `path`."""
    facts = path.stat()
    name = hashlib.sha256(f"{path.resolve()}\n{kind}".encode()).hexdigest()[:16]
    folder = cache_folder() / "tables"
    kept = folder / f"{name}-{facts.st_size:x}-{facts.st_mtime_ns:x}{Path(kind).suffix}"
    if kept.is_file():
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    part = part_of(kept)
    try:
        write(part)
        os.replace(part, kept)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    for old in folder.glob(f"{name}-*"):
        if old != kept:
            with suppress(OSError):
                old.unlink()
    return kept
