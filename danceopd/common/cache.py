"""The cache folder that runs share, and files in it that are derived from other files.

The folder is `DANCEOPD_CACHE`, else `danceopd` in the user's cache folder. Deleting it is safe: everything in it can be
made again. Files appear by one rename, so several processes may make the same one at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.common.files import partial_path

MIN_CACHED_BYTES = 1 << 24
"""The index of a smaller file is not cached."""


def cache_folder() -> Path:
    """`DANCEOPD_CACHE`, else `danceopd` below `XDG_CACHE_HOME`, `LOCALAPPDATA` or `~/.cache`. It may not exist yet."""
    given = os.environ.get("DANCEOPD_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(root) if root else Path.home() / ".cache") / "danceopd"


def cached_index(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The index that `make` computes of a file, from the cache when the file is large and has not changed since."""
    if path.stat().st_size < MIN_CACHED_BYTES:
        return make()

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, make())

    try:
        return np.load(cached_file(path, "rows.npy", write), mmap_mode="r")
    except (OSError, ValueError):  # the cache cannot be written, or the file in it is damaged
        return make()


def cached_file(path: Path, kind: str, write: Callable[[Path], None]) -> Path:
    """The cached file that `write` derives from `path`, made once for its size and modification time.

    `kind` tells several derived files of one path apart; its suffix is kept. Files of older versions are removed.
    """
    stat = path.stat()
    name = hashlib.sha256(f"{path.resolve()}\n{kind}".encode()).hexdigest()[:16]
    folder = cache_folder() / "tables"
    cached = folder / f"{name}-{stat.st_size:x}-{stat.st_mtime_ns:x}{Path(kind).suffix}"
    if cached.is_file():
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    part = partial_path(cached)
    try:
        write(part)
        os.replace(part, cached)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    for old in folder.glob(f"{name}-*"):
        if old != cached:
            with suppress(OSError):
                old.unlink()
    return cached


def cache_key(*facts: Any) -> str:
    """A hash of `facts` (plain data that JSON can hold) that names what they determine: 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:40]
