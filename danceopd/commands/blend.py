"""`danceopd blend`: several LoRAs of one base into one file, and what its rank lost, layer by layer, as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base_model import base_fingerprint, base_folder, empty_transformer
from ..blend import METHODS, Blended, blended, norm
from ..errors import UserError
from ..lora import WEIGHTS, read_adapter, write_adapter
from ..lora_file import Header, inspect_adapter
from ..shipped import portable, resolve

SHOWN = 12
"""Layers the table names, those that lost most."""


def run(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
    base: str | os.PathLike | None = None,
) -> tuple[Path, Blended]:
    """Blend LoRAs (files, folders, shipped names) and write the result to `output`; see `blend.blended`.

    `base` is the model they belong to, only its configuration is read; without it, the one that the files name, and
    when they name none, layers are taken as they are called. Returns the written file and the blend. Raises
    UserError when the LoRAs belong to different bases or `output` holds a LoRA already.
    """
    file = Path(output).expanduser() / WEIGHTS
    if file.exists():
        raise UserError(f"{file} exists and is not overwritten; name another output folder")
    headers = [inspect_adapter(resolve(os.fspath(path), "LoRA")) for path in paths]
    record = _base_of(headers, base)
    like = None if "base" not in record else empty_transformer(base_folder(record["base"]))
    adapters = [read_adapter(header.file, like) for header in headers]
    found = blended(adapters, weights, rank, method, density, scale, seed)
    shares = METHODS[method].weights(len(adapters)) if weights is None else weights
    if norm(found.adapter) <= 1e-6 * sum(abs(w) * norm(part) for w, part in zip(shares, adapters)):
        raise UserError("the blend changes nothing, since its adapters cancel out; give other weights")
    record["blend"] = f"{method}: " + " + ".join(f"{w:g} x {h.file.parent.name}" for w, h in zip(shares, headers))
    record["residual"] = f"{found.residual:.6f}"
    return write_adapter(found.adapter, file.parent, metadata=record), found


def _base_of(headers: Sequence[Header], given: str | os.PathLike | None) -> dict[str, str]:
    """The base that all files belong to, by name and fingerprint, as far as they say; UserError when they differ."""
    said = {str(h.record["base_sha256"]): h.file for h in headers if h.record.get("base_sha256")}
    if len(said) > 1:
        first, second = list(said.values())[:2]
        raise UserError(f"{first} and {second} were trained on different bases; blend adapters of one base")
    known = next(iter(said), None)
    name = portable(os.fspath(given)) if given is not None else next(
        (str(h.record["base"]) for h in headers if h.record.get("base")), None
    )
    if given is None and name is not None:
        try:
            base_folder(name)
        except UserError:  # it was made elsewhere; the files still say which one it is
            name = None
    record = {"base_sha256": known} if known else {}
    if name is not None:
        mine = base_fingerprint(base_folder(name))
        if known is not None and mine != known:
            raise UserError(f"{said[known]} was trained on another base than {name}; give the base it was trained on")
        record = {"base": name, "base_sha256": mine}
    return record


def show(found: Blended) -> None:
    """Prints what the rank lost: the layers that lost most, and all together."""
    from rich.table import Table

    from ..console import wide

    console, ranks = wide(), found.adapter.ranks
    lossy: list[tuple[str, Any]] = sorted(found.residuals.items(), key=lambda pair: -pair[1])
    lossy = [pair for pair in lossy if pair[1] > 0]
    if lossy:
        table = Table(box=None)
        for head in ("layer", "rank", "residual"):
            table.add_column(head, justify="left" if head == "layer" else "right")
        for name, residual in lossy[:SHOWN]:
            table.add_row(name, str(ranks[name]), f"{residual:.2%}")
        if len(lossy) > SHOWN:
            table.add_row(f"and {len(lossy) - SHOWN} more", "", f"up to {lossy[SHOWN][1]:.2%}")
        console.print(table, highlight=False)


def summary(found: Blended) -> str:
    """One line: layers, rank, numbers, and what the rank lost."""
    adapter = found.adapter
    lost = f"residual {found.residual:.2%} of the merged delta" if found.residual else "exact"
    return f"{len(adapter)} layers, rank {adapter.rank}, {adapter.parameters:,} numbers; {lost}"
