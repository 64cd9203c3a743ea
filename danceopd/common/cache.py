"""The cache folder that runs share: `DANCEOPD_CACHE`, else `danceopd` in the user's cache folder.

Deleting it is safe: everything in it can be made again. Files appear by one rename, so several processes may make the
same one at the same time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from danceopd.common.parse import local_path
from danceopd.errors import UserError


def cache_folder() -> Path:
    """`DANCEOPD_CACHE`, else `danceopd` below `XDG_CACHE_HOME`, `LOCALAPPDATA` or `~/.cache`. It may not exist yet.

    A user without a home, as in a container with an unknown uid, has `danceopd-UID` in the temporary folder.
    """
    given = os.environ.get("DANCEOPD_CACHE")
    if given:
        return local_path(given, "DANCEOPD_CACHE").absolute()
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if root:
        return Path(root) / "danceopd"
    try:
        return Path.home() / ".cache" / "danceopd"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"danceopd-{os.getuid()}"


READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a cache that may be read and not written: a run goes on, and keeps what it makes to itself."""


def check_cache() -> None:
    """Make the cache folder; UserError where it cannot be made, but for one that is read-only."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in READ_ONLY:
            return
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}); set DANCEOPD_CACHE to another folder"
        ) from None


def cache_key(*facts: Any) -> str:
    """A hash of `facts` (plain data that JSON can hold) that names what they determine: 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:40]
