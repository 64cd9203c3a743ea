"""Read the header of a safetensors file: names, shapes, dtypes and metadata, without loading a weight.

Pickles, git-lfs pointers and files that are cut off are refused, each with its own message. Nothing is unpickled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from danceopd.common.parse import local_path, parse_json
from danceopd.errors import UserError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LONGEST_HEADER = 100_000_000
_LONGEST_NAME = 1000
_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself: tensor shapes by key, dtypes as it names them (such as "BF16")."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    dtype_of: dict[str, str]  # by key


def read_header(file: Path) -> SafetensorsHeader:
    """The header of a safetensors file; UserError for a pickle, a git-lfs pointer, and an empty or damaged file."""
    from safetensors import SafetensorError, safe_open

    refuse_pickle(file)
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty (0 bytes); {_AGAIN}")
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        text = stream.read(length) if 2 <= length <= _LONGEST_HEADER else b""
    if not text:
        raise UserError(f"{file} is not a safetensors file (it does not begin with a header); {_AGAIN}")
    if len(text) < length:
        raise UserError(
            f"{file} is cut off inside its header: it has {size} bytes and the header alone takes {8 + length}; "
            f"{_AGAIN}"
        )
    try:
        header = parse_json(text)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        shapes = {key: tuple(int(n) for n in entry["shape"]) for key, entry in header.items()}
        dtype_of = {key: str(entry["dtype"]) for key, entry in header.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        raise UserError(f"{file} is not a safetensors file (its header cannot be read); {_AGAIN}") from None
    odd = next((key for key in header if len(key) > _LONGEST_NAME or not key.isprintable()), None)
    if odd is not None:
        what = f"{len(odd):,} characters" if len(odd) > _LONGEST_NAME else "control characters"
        raise UserError(f"{file} is damaged: the name of one of its tensors has {what}; {_AGAIN}")
    if end != size:
        raise UserError(
            f"{file} is {'cut off' if end > size else 'damaged'}: it has {size} bytes and its header "
            f"promises {end}; {_AGAIN}"
        )
    try:
        with safe_open(str(file), framework="numpy"):  # checks shapes, dtypes and offsets against each other
            pass
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged: its header cannot be read ({reason}); {_AGAIN}") from None
    return SafetensorsHeader(file, shapes, tuple(sorted(set(dtype_of.values()))), metadata, dtype_of)


def refuse_pickle(file: Path) -> None:
    """UserError when a file is a pickle, a git-lfs pointer or a GGUF, or cannot be opened; its first bytes are read."""
    local_path(file, "the model file")
    try:
        with file.open("rb") as stream:
            magic = stream.read(64)
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error.strerror}); check its permissions") from None
    # A safetensors file is a length and then "{"; a length of 640 begins with the bytes of a pickle.
    if file.suffix in PICKLE_SUFFIXES or (magic[8:9] != b"{" and magic.startswith(_PICKLE_MAGIC)):
        raise UserError(
            f"{file} is a pickle, which can run code when it is opened, and is refused; convert it "
            "to safetensors with a tool you trust"
        )
    if magic.startswith(b"GGUF"):
        raise UserError(f"{file} is a GGUF, whose weights are quantised; give the model in safetensors, bf16 or wider")
    if magic.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
