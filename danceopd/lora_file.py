"""LoRA files as files: which one a path means, what its header says, what is refused by its keys alone.

`inspect_adapter` reads the header and no weight, so a plan costs nothing. Only safetensors are opened:
nothing is unpickled.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danceopd.dialects import TEXT_ENCODERS, dialect, split_key
from danceopd.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
MARK = "danceopd"  # our key in a file's metadata
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
}


@dataclass(frozen=True)
class Header:
    """What a LoRA file says without its weights being loaded (`inspect_adapter`)."""

    file: Path
    shapes: dict[str, tuple[int, ...]]  # by key, as the file names it
    dtypes: tuple[str, ...]  # as safetensors names them, e.g. ("BF16",)
    ranks: dict[str, int]  # by layer, as the file names it
    dialect: str  # diffusers, peft, comfyui, kohya, plain, unknown
    metadata: dict[str, str] = field(default_factory=dict)  # the file's, as it stands

    @property
    def rank(self) -> int:
        """The largest rank; 0 when the file holds no LoRA."""
        return max(self.ranks.values(), default=0)

    @property
    def record(self) -> dict[str, Any]:
        """What danceopd wrote into the file: `modules`, `sha256` and the caller's strings; {} otherwise."""
        return _object(self.metadata.get(MARK))

    @property
    def peft(self) -> dict[str, Any] | None:
        """The file's PEFT configuration, from its metadata (diffusers) or from beside it (PEFT), or None."""
        config = _object(self.metadata.get("lora_adapter_metadata"))
        if config:
            return {key.removeprefix("transformer."): value for key, value in config.items()}
        beside = self.file.with_name("adapter_config.json")
        if self.dialect == "peft" and beside.is_file():
            return _object(beside.read_text(encoding="utf-8", errors="replace")) or None
        return None


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def few(names: Iterable[str]) -> str:
    """Up to three names, and how many more: 'a, b, c and 4 more'."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def adapter_file(path: str | os.PathLike) -> Path:
    """The file a path means: itself, or in a folder `pytorch_lora_weights.safetensors` or the only one.

    Raises UserError when there is none, several, or the file would have to be unpickled.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a LoRA's safetensors file or the folder that holds it "
            "(download one from the hub with `hf download OWNER/NAME --local-dir FOLDER`)"
        )
    if path.is_dir():
        return _file_in(path)
    try:
        with path.open("rb") as file:
            magic = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}); check its permissions") from None
    # A safetensors file is a length and then "{"; a length of 640 begins with the bytes of a pickle.
    if path.suffix in PICKLES or (magic[8:9] != b"{" and magic.startswith(PICKLED)):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, and is refused; convert it "
            "to safetensors with a tool you trust"
        )
    if magic.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
    return path


def _file_in(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole pipeline, not a LoRA; use it as a base, or extract a LoRA from it")
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {len(found)} safetensors files ({few(f.name for f in found)}) and none "
            f"is called {WEIGHTS}; name the one you mean"
        )
    if found:
        return found[0]
    pickles = [f.name for f in folder.iterdir() if f.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{folder} holds no safetensors file, only {few(pickles)}, which would have to be "
            "unpickled and is refused; convert it to safetensors with a tool you trust"
        )
    raise UserError(f"{folder} holds no safetensors file; a LoRA folder holds {WEIGHTS}")


def inspect_adapter(path: str | os.PathLike) -> Header:
    """Read a LoRA file's header: names, shapes, ranks, dtypes, dialect, metadata. No weight is loaded.

    Raises UserError for a missing, empty, truncated or foreign file.
    """
    file = adapter_file(path)
    mend = "download or copy it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        text = stream.read(length) if 2 <= length <= 100_000_000 else b""
    if size == 0:
        raise UserError(f"{file} is empty (0 bytes); {mend}")
    if not text:
        raise UserError(f"{file} is not a safetensors file (it does not begin with a header); {mend}")
    if len(text) < length:
        raise UserError(
            f"{file} is cut off inside its header: it has {size} bytes and the header alone takes {8 + length}; {mend}"
        )
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        shapes = {key: tuple(int(n) for n in entry["shape"]) for key, entry in header.items()}
        dtypes = tuple(sorted({str(entry["dtype"]) for entry in header.values()}))
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{file} is not a safetensors file (its header cannot be read); {mend}") from None
    if end != size:
        raise UserError(
            f"{file} is {'cut off' if end > size else 'damaged'}: it has {size} bytes and its header "
            f"promises {end}; {mend}"
        )
    parts = {key: split_key(key) for key in shapes if shapes[key]}
    ranks = {part[0]: shapes[key][0] for key, part in parts.items() if part and part[1] == "A"}
    return Header(file, shapes, dtypes, ranks, dialect(sorted(shapes)), metadata)


def refuse_foreign(header: Header) -> None:
    """UserError for all that the keys alone tell: no LoRA, a text encoder's part, another kind of adapter."""
    file, keys = header.file, list(header.shapes)
    if not keys:
        raise UserError(f"{file} holds no tensors, so it is not a LoRA; use the file your trainer saved")
    texts = [key for key in keys if TEXT_ENCODERS.match(key)]
    if texts:
        raise UserError(
            f"{file} also adapts a text encoder ({few(texts)}), and danceopd merges transformers "
            "only; save the LoRA again without its text-encoder part"
        )
    for mark, kind in OTHER_KINDS.items():
        marked = [key for key in keys if mark in key]
        if marked:
            raise UserError(
                f"{file} is a {kind} ({few(marked)}), which a plain LoRA cannot hold; convert it to "
                "a LoRA (peft.tuners.lora.conversion.save_as_lora) or train one without it"
            )
    unknown = [key for key in keys if split_key(key) is None]
    if len(unknown) == len(keys):
        raise UserError(
            f"{file} is not a LoRA: none of its {len(keys)} tensors is a lora_A, lora_B, lora_down "
            f"or lora_up ({few(unknown)}); give a LoRA file"
        )
    if unknown:
        raise UserError(
            f"{file} holds {len(unknown)} tensors that belong to no LoRA layer ({few(unknown)}); "
            "save the LoRA again with its A and B matrices only"
        )
