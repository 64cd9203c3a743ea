"""Write files so that a crash, a full disk or a second process never leaves half a file.

Content goes to a temporary name, is synced to the disk, and takes its real name by one rename. Errors of the operating
system become a `UserError` that names the path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from danceopd.errors import UserError

_PARTIAL = re.compile(r"\..+\.\d+")
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """A context that turns errors of the operating system into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        in_the_way = error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR) and isinstance(error.filename, str)
        where = error.filename if in_the_way else path
        raise UserError(_sentence(where, error.errno, error.strerror or str(error))) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        code = next((c for c in DISK_FULL if f"os error {c}" in str(error)), None)
        raise UserError(_sentence(path, code, str(error))) from error


def _sentence(path: str | Path, code: int | None, reason: str) -> str:
    if code in DISK_FULL:
        return (
            f"the disk is full at {path}; nothing was overwritten: free some space and run the same command "
            "again to continue"
        )
    return f"cannot write {path}: {reason}; mend that or choose another --output"


def is_disk_full(error: OSError) -> bool:
    """Whether the error says that the disk, or the user's quota, is full."""
    return error.errno in DISK_FULL


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, has reached the disk (Windows cannot open a folder)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def inside(folder: Path, name: str) -> Path | None:
    """What exists as `name` below a folder; None for what leaves it (absolute, `..`, a link) or is not there."""
    try:
        path = (folder / name).resolve(strict=True)
        return path if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a circle of links
        return None


def partial_path(path: Path) -> Path:
    """The temporary name beside `path` that this process writes to before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def numbered_folders(folder: Path, kind: str) -> list[Path]:
    """The folders `kind-000050` and the like in a folder, by their numbers; others of such a name are passed over."""
    found = {path: path.name.removeprefix(f"{kind}-") for path in folder.glob(f"{kind}-*") if path.is_dir()}
    return sorted((p for p, number in found.items() if re.fullmatch("[0-9]+", number)), key=lambda p: int(found[p]))


def is_partial(path: Path) -> bool:
    """Whether this is the temporary name of a file that is being, or was never, written."""
    return bool(_PARTIAL.fullmatch(path.name))


def remove_partial_files(folder: Path, below: bool = True) -> None:
    """Delete the files in a folder, or anywhere `below` it, that killed processes left under temporary names.

    Only for a folder that this process has locked: the files of a running writer would go too.
    """
    for left in folder.rglob(".*") if below else folder.glob(".*"):
        if is_partial(left) and left.is_file():
            left.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all; an old one stays until then."""
    part = partial_path(path)
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


def json_safe(value: Any, text: bool = True) -> Any:
    """`value` as JSON can hold it: NaN and infinities as text, else as None; one-element tensors and arrays as numbers.
    """
    if isinstance(value, dict):
        return {key: json_safe(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item, text) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if text else None
    return value


def json_line(value: Any) -> str:
    """`value` as one line of a JSON Lines file, in whatever way its readers split lines (U+2028 counts for some)."""
    return json.dumps(value, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"


def read_lines(path: Path) -> Iterator[dict]:
    """The objects in a JSON Lines file, none where there is no file; lines that hold none (cut off) are skipped."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                with suppress(ValueError, RecursionError):
                    if isinstance(line := json.loads(text), dict):
                        yield line


def write_json(path: Path, value: Any, text: bool = True) -> None:
    """Write `json_safe(value, text)` whole or not at all; UserError for a full disk, or a path that cannot be written.
    """
    with disk_errors(path):
        write_atomic(path, (json.dumps(json_safe(value, text), indent=1, ensure_ascii=False) + "\n").encode())


def lock_file(path: Path) -> IO[str] | None:
    """Lock the folder of the lock file `path` for this process until the returned file is closed.

    None where locks do not exist. UserError when another process holds it.
    """
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
