"""The header of a LoRA file: which file a path means, its layers and ranks, and what its keys alone rule out.

`inspect_adapter` reads the header and no weight, so checks before a run cost nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danceopd.adapters.dialects import TEXT_ENCODERS, dialect, split_key
from danceopd.common.messages import few
from danceopd.common.safetensors import PICKLE_SUFFIXES, SafetensorsHeader, read_header, refuse_pickle
from danceopd.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a LoRA file."""
METADATA_KEY = "danceopd"
"""The entry of a file's metadata that danceopd writes."""
OTHER_ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
}
"""Parts of keys -> the kind of adapter that has them, which is no plain LoRA."""


@dataclass(frozen=True)
class LoraHeader(SafetensorsHeader):
    """What a LoRA file says of itself without its weights (`inspect_adapter`)."""

    ranks: dict[str, int]  # by layer, as the file names it
    dialect: str  # diffusers, peft, comfyui, kohya, plain, unknown

    @property
    def rank(self) -> int:
        """The largest rank; 0 when the file holds no LoRA."""
        return max(self.ranks.values(), default=0)

    @property
    def record(self) -> dict[str, Any]:
        """What danceopd wrote into the file: `modules`, `sha256` and the caller's strings; {} otherwise."""
        return _json_object(self.metadata.get(METADATA_KEY))

    @property
    def peft(self) -> dict[str, Any] | None:
        """The file's PEFT configuration: from its metadata (diffusers), or from the file beside it (PEFT); or None."""
        config = _json_object(self.metadata.get("lora_adapter_metadata"))
        if config:
            return {key.removeprefix("transformer."): value for key, value in config.items()}
        beside = self.file.with_name("adapter_config.json")
        if self.dialect == "peft" and beside.is_file():
            return _json_object(beside.read_text(encoding="utf-8", errors="replace")) or None
        return None


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def adapter_file(path: str | os.PathLike) -> Path:
    """The LoRA file that a path means: itself, or in a folder `pytorch_lora_weights.safetensors` or the only one.

    UserError when there is none, when there are several, and for a pickle.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a LoRA's safetensors file or the folder that holds it "
            "(download one from the hub with `hf download OWNER/NAME --local-dir FOLDER`)"
        )
    if path.is_dir():
        return _file_in(path)
    refuse_pickle(path)
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
    pickles = [f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise UserError(
            f"{folder} holds no safetensors file, only {few(pickles)}, which would have to be "
            "unpickled and is refused; convert it to safetensors with a tool you trust"
        )
    raise UserError(f"{folder} holds no safetensors file; a LoRA folder holds {WEIGHTS}")


def inspect_adapter(path: str | os.PathLike) -> LoraHeader:
    """The header of a LoRA file or folder: names, shapes, ranks, dtypes, dialect, metadata. No weight is loaded.

    UserError for a file that is missing, empty, cut off or no safetensors file.
    """
    found = read_header(adapter_file(path))
    parts = {key: split_key(key) for key in found.shapes if found.shapes[key]}
    ranks = {part[0]: found.shapes[key][0] for key, part in parts.items() if part and part[1] == "A"}
    return LoraHeader(found.file, found.shapes, found.dtypes, found.metadata, ranks, dialect(sorted(found.shapes)))


def check_is_lora(header: LoraHeader) -> None:
    """UserError when the keys alone rule a file out: no LoRA, a text encoder's LoRA, another kind of adapter."""
    file, keys = header.file, list(header.shapes)
    if not keys:
        raise UserError(f"{file} holds no tensors, so it is not a LoRA; use the file your trainer saved")
    texts = [key for key in keys if TEXT_ENCODERS.match(key)]
    if texts:
        raise UserError(
            f"{file} also adapts a text encoder ({few(texts)}), and danceopd merges transformers "
            "only; save the LoRA again without its text-encoder part"
        )
    for mark, kind in OTHER_ADAPTERS.items():
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


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a whole model and not an adapter; headers are read, at most.

    A run folder that was fused is both, and counts as a LoRA. UserError for a file that is no safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return False
        return (path / "model_index.json").is_file() or (path / "config.json").is_file()
    header = inspect_adapter(path)
    return bool(header.shapes) and not header.ranks and not any(m in k for k in header.shapes for m in OTHER_ADAPTERS)
