"""`write_adapter`: write a LoRA that stock diffusers loads exactly: diffusers names, alpha folded into B."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from danceopd.adapters.header import METADATA_KEY, WEIGHTS
from danceopd.common.files import disk_errors, write_atomic
from danceopd.models.lora import Adapter


def write_adapter(
    adapter: Adapter,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` in diffusers' names and return its path.

    `metadata` (strings) is stored, with the number of layers and their sha256, as JSON in the file's one metadata
    entry, `danceopd`: one, because safetensors writes several in random order, and equal adapters must give equal
    bytes. Loading needs no metadata. The file appears whole or not at all; an old one stays until then.

    UserError when the disk is full or the folder cannot be written, ValueError for an adapter that is empty or not
    finite in `dtype`.
    """
    from safetensors.torch import save

    if not len(adapter):
        raise ValueError("an adapter without layers is not written")
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError("metadata holds strings only")
    rounded = adapter.to("cpu", dtype)
    if not all(tensor.isfinite().all() for pair in rounded.tensors.values() for tensor in pair):
        raise ValueError(f"the adapter holds NaN or infinite numbers in {dtype}")
    tensors = {
        f"transformer.{name}.lora_{half}.weight": tensor.to(dtype).contiguous()
        for name, pair in rounded.tensors.items()
        for half, tensor in zip("AB", pair)
    }
    record = {**(metadata or {}), "modules": len(adapter), "sha256": rounded.sha256}
    content = save(tensors, {METADATA_KEY: json.dumps(record, sort_keys=True)})
    path = Path(folder) / WEIGHTS
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path
