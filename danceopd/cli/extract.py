"""`danceopd extract`: write the difference of two models as a LoRA, and print what each layer lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danceopd.adapters.extract import Change, Extraction, extract
from danceopd.common.console import progress_bar, wide_console
from danceopd.common.messages import did_you_mean
from danceopd.common.tensors import DTYPES
from danceopd.errors import UserError


def run(
    base: str, finetuned: str, output: Path, rank: int, energy: float | None, device: str, dtype: str,
    drop: Sequence[str] = (),
) -> tuple[Path, Extraction]:  # fmt: skip
    """`extract` with a progress bar; `dtype` is a key of DTYPES."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}{did_you_mean(dtype, DTYPES)}")
    with progress_bar("extracting") as report:
        return extract(base, finetuned, output, rank, energy, device, DTYPES[dtype], report, drop)


def show(found: Extraction) -> None:
    """Print what each layer lost, and which tensors changed and are not in the LoRA."""
    from rich.table import Table

    console = wide_console()
    table = Table(box=None)
    for head in ("layer", "rank", "change", "residual"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    for change in found.adapted:
        table.add_row(change.name, str(change.rank), _percent(change.change), _percent(change.residual))
    console.print(table, highlight=False)
    if found.not_adapted:
        table = Table(box=None, title="changed, and not in the LoRA", title_justify="left")
        table.add_column("tensor")
        table.add_column("change", justify="right")
        for change in found.not_adapted:
            table.add_row(change.name, _percent(change.change))
        console.print(table, highlight=False)


def summary(found: Extraction) -> str:
    """One line: layers, rank, parameters, and what was lost."""
    adapter = found.adapter
    lines = f"{len(adapter)} layers, rank {adapter.rank}, {adapter.parameters:,} parameters"
    return f"{lines}; residual {_percent(found.residual)} of the change" + _worst(found.adapted)


def _worst(changes: tuple[Change, ...]) -> str:
    worst = max(changes, key=lambda change: change.residual)
    return f" (worst layer {worst.name}, {_percent(worst.residual)})"


def _percent(share: float) -> str:
    return "new" if share == float("inf") else f"{share:.2%}"
