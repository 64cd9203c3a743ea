"""`write_adapter`: write a LoRA that stock diffusers loads exactly: diffusers names, alpha folded into B."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from danceopd.adapters.dialects import stock_name
from danceopd.adapters.header import METADATA_KEY, WEIGHTS
from danceopd.common.files import disk_errors, write_atomic
from danceopd.errors import UserError
from danceopd.models.lora import Adapter


def write_adapter(
    adapter: Adapter,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    one_rank: bool = True,
) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` in diffusers' names and return its path.

    `metadata` (strings) is stored, with the number of layers and their sha256, as JSON in the file's one metadata
    entry, `danceopd`: one, because safetensors writes several in random order, and equal adapters must give equal
    bytes. Loading needs no metadata. The file appears whole or not at all; an old one stays until then.

    Layers of smaller ranks are filled up with zeros to the largest (`fill`), unless `one_rank` is False: such a file is
    smaller, and diffusers before 0.40 loads it at wrong strengths.

    UserError when the disk is full, the folder cannot be written, or `dtype` cannot hold the numbers; ValueError for an
    adapter that is empty or not finite.
    """
    from safetensors.torch import save

    if not len(adapter):
        raise ValueError("an adapter without layers is not written")
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError("metadata holds strings only")
    rounded = adapter.to("cpu", dtype)
    check_range(adapter.tensors, dtype)
    layers, ranks = fill(rounded.tensors) if one_rank else (rounded.tensors, {})
    tensors = {
        f"{stock_name(name)}.lora_{half}.weight": tensor.to(dtype).contiguous()
        for name, pair in layers.items()
        for half, tensor in zip("AB", pair)
    }
    record = {**(metadata or {}), **ranks, "modules": len(adapter), "sha256": rounded.sha256}
    content = save(tensors, {METADATA_KEY: json.dumps(record, sort_keys=True)})
    path = Path(folder) / WEIGHTS
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path


def fill(layers: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict]]:
    """The pairs, all of the largest rank, and what to record: {"ranks": {layer: rank}}, {} where they are equal.

    Rows of A and columns of B that are zero change nothing. Loaders that know one rank and one alpha, such as
    diffusers before 0.40, scale every layer by these two. `read_adapter` takes the zeros away again.
    """
    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    most = max(ranks.values(), default=0)
    filled = {
        name: (F.pad(a, (0, 0, 0, most - ranks[name])), F.pad(b, (0, most - ranks[name])))
        for name, (a, b) in layers.items()
    }
    return filled, {"ranks": ranks} if len(set(ranks.values())) > 1 else {}


def check_range(tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
    """UserError for numbers that are finite and beyond `dtype`; ValueError for those that are not finite at all."""
    found = [half.abs().max().float().cpu() for pair in tensors.values() for half in pair]
    largest = float(torch.stack(found).max())  # of tensors: Python's max drops a NaN that is not first
    if not isfinite(largest):
        raise ValueError("the adapter holds NaN or infinite numbers")
    if not torch.tensor(largest, dtype=torch.float64).to(dtype).isfinite():
        raise UserError(
            f"the LoRA holds numbers up to {largest:.3g} and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}; write it as bf16 or fp32"
        )
