"""`danceopd blend`: write several LoRAs of one base as one, and print what its rank lost, layer by layer.

On request: what would be written, before (`planned`), and where the LoRAs fight, after (`report`).
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.adapters.blend import (
    BlendResult,
    blend_parts,
    blend_ranks,
    blend_with_residual,
    check_blend,
    delta_norm,
)
from danceopd.adapters.blending.conflict import Block, measure, sentences
from danceopd.adapters.blending.layers import LayerRule
from danceopd.adapters.blending.methods import METHODS, Method, method_of
from danceopd.adapters.header import WEIGHTS, LoraHeader, inspect_adapter
from danceopd.adapters.read import adapter_shapes, read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.cli.blending.asked import Asked
from danceopd.common.files import disk_errors
from danceopd.common.messages import did_you_mean
from danceopd.common.shipped import portable, resolve
from danceopd.common.tensors import DTYPES
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, base_folder, empty_transformer
from danceopd.models.lora import Adapter
from danceopd.plugins import name_of, origin

if TYPE_CHECKING:
    from danceopd.cli.blending.data import Calibration

MOST = 1e4
"""The largest weight or strength of a LoRA."""
SHOWN = 12
"""Layers in the table: those that lost most."""
PICTURE = "conflicts.png"
"""What `--report` draws beside the LoRA."""
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `base` is the model that the LoRAs belong to, of which only the configuration is
    read; by default the one that the files name. Without one, layers keep the names they have in the files. `drop` as
    for `read_adapter`, the rest as for `blend_with_residual`.
    """

    paths: Sequence[str | os.PathLike]
    output: str | os.PathLike
    method: str | Method = "linear"
    weights: Sequence[float] | None = None
    rank: int | None = None
    density: float | None = None
    scale: float | str = 1.0
    seed: int = 0
    base: str | os.PathLike | None = None
    drop: Sequence[str] = ()
    layers: Sequence[LayerRule] = ()
    space: str | None = None
    size: str | None = None
    dtype: str = "fp32"
    asked: Asked = Asked()

    @property
    def file(self) -> Path:
        """The LoRA to write."""
        return Path(self.output).expanduser() / WEIGHTS

    @property
    def how(self) -> Method:
        """The method itself."""
        return method_of(self.method)

    def check(self) -> None:
        """UserError for an output that is there already, and for numbers and names that are none."""
        if self.file.exists():
            raise UserError(f"{self.file} exists and is not overwritten; name another output folder")
        numbers = [number for number in (self.scale, *(self.weights or ())) if not isinstance(number, str)]
        if not all(abs(number) <= MOST for number in numbers):
            raise UserError(f"weights and scale must be numbers from -{MOST:g} to {MOST:g}; give smaller ones")
        if self.dtype not in DTYPES:
            raise UserError(f"there is no dtype {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}")
        self.asked.check(self.how)

    def calibration(
        self, headers: Sequence[LoraHeader], record: Mapping[str, str], adapters: Sequence[Adapter]
    ) -> Calibration | None:
        """What is recorded for methods that look at inputs; None for the others."""
        if self.how.regress is None:
            return None
        from danceopd.cli.blending.data import calibration  # late: other methods need no model

        files, output = [header.file for header in headers], self.file.parent
        return calibration(self.asked, self.how, record.get("base"), files, adapters, output, self.seed)

    def resolve(self, adapters: Sequence[Adapter]) -> tuple[list[float], int | None, dict[str, int]]:
        """(the weights, the rank to end at, the rank of each layer); UserError as `check_blend` and `blend_parts`."""
        how = check_blend(adapters, self.weights, self.rank, self.method, self.density, self.scale, self.space)
        weights = list(how.weights(len(adapters)) if self.weights is None else self.weights)
        parts = blend_parts(adapters, weights, how, self.layers)
        if self.size is None:
            return weights, self.rank, blend_ranks(adapters, parts, how, self.rank, self.space)
        cost, rest = _bytes(adapters, parts, self.dtype)
        rank = int((_size(self.size) - rest) // cost)
        if rank < 1:
            raise UserError(
                f"--size {self.size} is too small: these {len(parts)} layers take {(cost + rest) / 1e6:.2f} MB at rank "
                "1; give more, or leave layers out"
            )
        rank = min(rank, self.rank or rank)
        return weights, rank, blend_ranks(adapters, parts, how, rank, self.space)


def run(request: Request, tell: Callable[[str], None] | None = None) -> tuple[Path, BlendResult]:
    """Write the blend of LoRAs (files, folders, shipped names). Returns the written file and the blend.

    With `tell`, where the LoRAs fight is said line by line, and drawn beside the file. UserError when the LoRAs belong
    to different bases, or `output` holds a LoRA already.
    """
    request.check()
    headers, record = _headers(request)
    adapters = [read_adapter(header.file, _like(record), drop=request.drop) for header in headers]
    for header, adapter in zip(headers, adapters):
        if not delta_norm(adapter):
            raise UserError(f"{header.file} is empty: B·A is zero in every layer, so it changes nothing; leave it out")
    weights, rank, _ = request.resolve(adapters)
    plan = request.calibration(headers, record, adapters)
    for line in plan.said() if plan is not None else ():
        print(line, file=sys.stderr, flush=True)
    with nullcontext() if plan is None else plan.recording() as inputs:
        found = blend_with_residual(
            adapters, weights, rank, request.method, request.density, request.scale, request.seed, request.layers,
            request.space, inputs,
        )  # fmt: skip
    if delta_norm(found.adapter) <= 1e-6 * sum(abs(w) * delta_norm(part) for w, part in zip(weights, adapters)):
        raise UserError("the blend changes nothing, since its adapters cancel out; give other weights")
    names = _names(headers)
    record["blend"] = f"{request.how.name}: " + " + ".join(f"{w:g} x {name}" for w, name in zip(weights, names))
    name = name_of("blend method", request.method)
    if name not in METHODS:
        record["method"] = f"{name} ({origin('blend method', name)})"
    record["residual"] = f"{found.residual:.6f}"
    if request.layers:
        record["layers"] = ", ".join(rule.given for rule in request.layers)
    if found.scale != 1:
        record["scale"] = f"{found.scale:.6g}"
    drawn = request.seed if request.how.random else None
    said = None if plan is None else "; ".join(plan.said())
    for key, value in (("space", request.space), ("density", request.density), ("seed", drawn), ("inputs", said)):
        if value is not None:
            record[key] = str(value)
    file = write_adapter(found.adapter, request.file.parent, DTYPES[request.dtype], record)
    if tell is not None:
        parts = blend_parts(adapters, weights, request.how, request.layers)
        entering = []
        for i, adapter in enumerate(adapters):
            strengths = {n: p.factor * dict(zip(p.adapters, p.weights)).get(i, 0.0) for n, p in parts.items()}
            pairs = adapter.tensors.items()
            entering.append(Adapter({n: (a, strengths[n] * b) for n, (a, b) in pairs if strengths.get(n)}))
        report(entering, names, file.with_name(PICTURE), tell)
    return file, found


def planned(request: Request) -> str:
    """What `run` would write, from the headers of the files alone; UserError for all that shapes tell."""
    request.check()
    headers, record = _headers(request)
    adapters = [adapter_shapes(header.file, _like(record), drop=request.drop) for header in headers]
    weights, _, ranks = request.resolve(adapters)
    sizes = {n: (a.shape[1], b.shape[0]) for one in adapters for n, (a, b) in one.tensors.items() if n in ranks}
    item, most = DTYPES[request.dtype].itemsize, max(ranks.values())
    size = sum(most * (into + out) * item for into, out in sizes.values()) + _HEADER * len(sizes)
    parts = " + ".join(f"{w:g} x {name}" for w, name in zip(weights, _names(headers)))
    space = request.space or request.how.space
    dense = max(into * out for into, out in sizes.values()) * 4 * (len(adapters) + 2) if space == "full" else 0
    plan = request.calibration(headers, record, adapters)
    dense = 0 if request.how.merge is None else dense
    memory = 8 * sum(one.parameters for one in adapters) + 2 * size + dense
    model, moments = (0, 0) if plan is None else plan.memory(adapters, weights, request.layers)
    parts_of = "" if plan is None else f" (the base {model / 1e6:.0f} MB, Gram matrices {moments / 1e6:.0f} MB)"
    left_out = len({name for one in adapters for name in one.tensors}) - len(ranks)
    return "\n".join(
        [
            f"would write: {request.file}",
            f"layers: {len(ranks)}" + (f", {left_out} left out" if left_out else ""),
            f"rank: {_ranks(ranks)}",
            f"dtype: {request.dtype}",
            f"size: about {size / 1e6:.3g} MB",
            f"blend: {request.how.name} of {parts}",
            f"base: {record.get('base', 'not named by the files')}",
            *(() if plan is None else plan.said()),
            f"memory: about {(memory + model + moments) / 1e6:.0f} MB{parts_of}",
        ]
    )


def report(adapters: Sequence[Adapter], names: Sequence[str], picture: Path, tell: Callable[[str], None]) -> None:
    """Print energy, cosine and opposite signs by block as a table, draw them, and say them in sentences."""
    from rich.table import Table

    from danceopd.common.console import wide_console

    blocks, pairs = measure(adapters), list(combinations(range(len(names)), 2))
    total = [sum(block.energy(i) for block in blocks) for i in range(len(names))]
    heads = ["stack", "block", "kind", *(f"energy of {name}" for name in names)]
    heads += ["cosine", "opposite signs"] if len(pairs) < 2 else ["lowest cosine", "opposite signs", "of"]
    table = Table(box=None)
    for head in heads:
        table.add_column(head, justify="left" if head in ("stack", "kind", "of") else "right", no_wrap=True)
    for block in blocks:
        row = [block.stack, "" if block.number is None else str(block.number), block.kind]
        row += [f"{block.energy(i) / (whole or 1):.1%}" for i, whole in enumerate(total)]
        cosines = {pair: cosine for pair in pairs if (cosine := block.cosine(pair)) is not None}
        if cosines:
            worst = min(cosines, key=cosines.__getitem__)
            row += [f"{cosines[worst]:.2f}", f"{block.conflict(worst) or 0:.0%}"]
            row += [" and ".join(names[i] for i in worst)] if len(pairs) > 1 else []
        table.add_row(*row, *["–"] * (len(heads) - len(row)))
    wide_console(least=sum(24 + len(head) for head in heads)).print(table, highlight=False)
    for sentence in sentences(blocks, names):
        tell(sentence)
    if pairs:
        with disk_errors(picture):
            _drawn(blocks, names, pairs, total).save(picture)
        tell(f"picture: {picture}")


def _drawn(
    blocks: Sequence[Block], names: Sequence[str], pairs: Sequence[tuple[int, int]], total: Sequence[float]
) -> Any:
    """A row of squares for each measure and kind of layer, a square for each block.

    Orange: against each other; blue: the same way; white: neither. Grey: the share of an adapter's energy.
    """
    from PIL import Image

    from danceopd.run.plots import grid

    numbers = sorted({block.number for block in blocks if block.number is not None})
    columns: list[int | None] = [*numbers, *([None] if any(block.number is None for block in blocks) else [])]
    kinds = list(dict.fromkeys((block.stack, block.kind) for block in blocks if block.number is not None))
    kinds += [("", block.kind) for block in blocks if block.number is None]
    most = max(block.energy(i) / (whole or 1) for block in blocks for i, whole in enumerate(total)) or 1.0

    def square(signed: float | None, grey: float = 0.0) -> Any:
        if signed is None:
            return None
        hue = (213, 94, 0) if signed < 0 else (0, 114, 178) if signed > 0 else (60, 60, 66)
        depth = min(1.0, 2 * abs(signed)) if signed else grey
        return Image.new("RGB", (12, 12), tuple(round(255 + (c - 255) * depth) for c in hue))

    rows: list[list[Any]] = []
    labels = []
    for stack, kind in dict.fromkeys(kinds):
        here = {block.number: block for block in blocks if (block.stack, block.kind) == (stack, kind)}
        found = [here.get(column) for column in columns]
        for pair in pairs:
            both = "" if len(pairs) == 1 else f" {names[pair[0]]}, {names[pair[1]]}"
            rows.append([square(b.cosine(pair) if b else None) for b in found])
            labels.append(f"cosine{both}: {kind} {stack}".strip())
            conflicts = [b.conflict(pair) if b else None for b in found]
            rows.append([square(None if c is None else 0.5 - c) for c in conflicts])
            labels.append(f"opposite signs{both}: {kind} {stack}".strip())
        for i, name in enumerate(names):
            rows.append([square(0.0, b.energy(i) / (total[i] or 1) / most) if b else None for b in found])
            labels.append(f"energy of {name}: {kind} {stack}".strip())
    return grid(rows, labels, ["rest" if column is None else str(column) for column in columns], 2)


_HEADER = 300
"""Bytes of a layer in the header of a file, about."""


def _bytes(adapters: Sequence[Adapter], parts: Mapping[str, Any], dtype: str) -> tuple[int, int]:
    """(bytes that one rank of all layers takes in a file, bytes of the header, about)."""
    sizes = {n: (a.shape[1], b.shape[0]) for one in adapters for n, (a, b) in one.tensors.items() if n in parts}
    return sum(into + out for into, out in sizes.values()) * DTYPES[dtype].itemsize, _HEADER * len(sizes)


def _size(text: str) -> float:
    """Bytes of "50MB" or "1.5 GiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)b\s*", text.lower())
    if not found:
        raise UserError(f"--size is {text!r}; give the largest size of the file, such as 50MB")
    return float(found[1]) * UNITS[found[2]]


def _names(headers: Sequence[LoraHeader]) -> list[str]:
    """What the LoRAs are called: their folders, or their files where the folders do not tell them apart."""
    folders = [header.file.parent.name for header in headers]
    return folders if len(set(folders)) == len(folders) else [header.file.stem for header in headers]


def _like(record: Mapping[str, str]) -> Any:
    return None if "base" not in record else empty_transformer(base_folder(record["base"]))


def _headers(request: Request) -> tuple[list[LoraHeader], dict[str, str]]:
    """The headers of the LoRAs, and the base that they share as far as known, by name and fingerprint."""
    headers = [inspect_adapter(resolve(os.fspath(path), "LoRA")) for path in request.paths]
    return headers, _base_of(headers, request.base)


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
    """One line: layers, ranks, parameters, the strength where it is not 1, and what the rank lost."""
    adapter = found.adapter
    lost = f"residual {found.residual:.2%} of the merged delta" if found.residual else "exact"
    strength = "" if found.scale == 1 else f", strength {found.scale:.3g}"
    return f"{len(adapter)} layers, rank {_ranks(adapter.ranks)}, {adapter.parameters:,} parameters{strength}; {lost}"


def _ranks(ranks: Mapping[str, int]) -> str:
    """ "80", or "80 (24 layers) and 40 (8 layers), filled up with zeros to 80"."""
    counts = sorted(Counter(ranks.values()).items(), reverse=True)
    if len(counts) == 1:
        return str(counts[0][0])
    listed = ", ".join(f"{rank} ({count} layers)" for rank, count in counts[:4])
    return f"{listed}{' and others' * (len(counts) > 4)}, all filled up with zeros to {counts[0][0]}"
