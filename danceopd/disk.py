"""Writing files so that a crash, a full disk or a second process never leaves half of one behind.

Everything goes to a temporary name, reaches the disk, and takes its real name by one rename. What the
operating system refuses becomes a `UserError` that names the place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from .errors import UserError

_PART = re.compile(r"\..+\.\d+")
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_faults(place: str | Path) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into one sentence about `place`."""
    try:
        yield
    except OSError as error:
        raise UserError(_sentence(place, error.errno, error.strerror or str(error))) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        code = next((c for c in FULL if f"os error {c}" in str(error)), None)
        raise UserError(_sentence(place, code, str(error))) from error


def _sentence(place: str | Path, code: int | None, reason: str) -> str:
    if code in FULL:
        return (
            f"the disk is full at {place}; nothing was overwritten: free some space and run the same command "
            "again to continue"
        )
    return f"cannot write {place}: {reason}; mend that or choose another --output"


def full(error: OSError) -> bool:
    """Whether it is the disk, or the user's share of it, that ran out."""
    return error.errno in FULL


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def part_of(path: Path) -> Path:
    """The temporary name beside `path` that this process writes to before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def sweep(folder: Path) -> None:
    """Deletes the files below a folder that killed writers left under their temporary names.

    Only for a folder that is locked: the parts of a writer that still lives would go too.
    """
    for left in folder.rglob(".*"):
        if _PART.fullmatch(left.name) and left.is_file():
            left.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all."""
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def lock(path: Path) -> IO[str] | None:
    """Holds a folder for this process until the answer is closed; None where locks do not exist."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - the open file is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"output folder {path.parent} is in use by another danceopd process; wait for it, "
            "or choose another --output"
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return None
    return file
