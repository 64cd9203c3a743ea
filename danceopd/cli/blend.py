"""`danceopd blend`: write several LoRAs of one base as one, and print what its rank lost, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danceopd.adapters.blend import BlendResult, blend_with_residual, delta_norm
from danceopd.adapters.blend_methods import METHODS
from danceopd.adapters.header import WEIGHTS, LoraHeader, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.shipped import portable, resolve
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, base_folder, empty_transformer

MOST = 1e4
"""The largest weight or strength of a LoRA."""
SHOWN = 12
"""Layers in the table: those that lost most."""


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
    drop: Sequence[str] = (),
) -> tuple[Path, BlendResult]:
    """Blend LoRAs (files, folders, shipped names) as `blend_with_residual` does and write the result to `output`.

    `base` is the model they belong to, of which only the configuration is read; by default the one that the files name.
    Without a base, layers keep the names they have in the files. `drop` as for `read_adapter`. Returns the written file
    and the blend. UserError when the LoRAs belong to different bases, or `output` holds a LoRA already.
    """
    file = Path(output).expanduser() / WEIGHTS
    if file.exists():
        raise UserError(f"{file} exists and is not overwritten; name another output folder")
    if not all(abs(number) <= MOST for number in (scale, *(weights or ()))):
        raise UserError(f"weights and scale must be numbers from -{MOST:g} to {MOST:g}; give smaller ones")
    headers = [inspect_adapter(resolve(os.fspath(path), "LoRA")) for path in paths]
    record = _base_of(headers, base)
    like = None if "base" not in record else empty_transformer(base_folder(record["base"]))
    adapters = [read_adapter(header.file, like, drop=drop) for header in headers]
    for header, adapter in zip(headers, adapters):
        if not delta_norm(adapter):
            raise UserError(f"{header.file} is empty: B·A is zero in every layer, so it changes nothing; leave it out")
    found = blend_with_residual(adapters, weights, rank, method, density, scale, seed)
    shares = METHODS[method].weights(len(adapters)) if weights is None else weights
    if delta_norm(found.adapter) <= 1e-6 * sum(abs(w) * delta_norm(part) for w, part in zip(shares, adapters)):
        raise UserError("the blend changes nothing, since its adapters cancel out; give other weights")
    record["blend"] = f"{method}: " + " + ".join(f"{w:g} x {h.file.parent.name}" for w, h in zip(shares, headers))
    record["residual"] = f"{found.residual:.6f}"
    return write_adapter(found.adapter, file.parent, metadata=record), found


def _base_of(headers: Sequence[LoraHeader], given: str | os.PathLike | None) -> dict[str, str]:
    """The base that all files name, by name and fingerprint as far as known; UserError when they differ."""
    recorded = {str(h.record["base_sha256"]): h.file for h in headers if h.record.get("base_sha256")}
    if len(recorded) > 1:
        first, second = list(recorded.values())[:2]
        raise UserError(f"{first} and {second} were trained on different bases; blend adapters of one base")
    known = next(iter(recorded), None)
    name = portable(os.fspath(given)) if given is not None else next(
        (str(h.record["base"]) for h in headers if h.record.get("base")), None
    )
    if given is None and name is not None:
        try:
            base_folder(name)
        except UserError:  # it is not on this machine; the files still have its fingerprint
            name = None
    record = {"base_sha256": known} if known else {}
    if name is not None:
        mine = base_fingerprint(base_folder(name))
        if known is not None and mine != known:
            file = recorded[known]
            raise UserError(f"{file} was trained on another base than {name}; give the base it was trained on")
        record = {"base": name, "base_sha256": mine}
    return record


def show(found: BlendResult) -> None:
    """Print the layers that lost most to the rank."""
    from rich.table import Table

    from danceopd.common.console import wide_console

    console, ranks = wide_console(), found.adapter.ranks
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


def summary(found: BlendResult) -> str:
    """One line: layers, rank, parameters, and what the rank lost."""
    adapter = found.adapter
    lost = f"residual {found.residual:.2%} of the merged delta" if found.residual else "exact"
    return f"{len(adapter)} layers, rank {adapter.rank}, {adapter.parameters:,} parameters; {lost}"
