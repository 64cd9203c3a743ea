"""`danceopd extract`: what an extraction kept and lost, layer by layer, as a table."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..extract import Change, Extraction, extract, progress

DTYPES = ("fp32", "bf16", "fp16")


def run(
    base: str, finetuned: str, output: Path, rank: int, energy: float | None, device: str, dtype: str
) -> tuple[Path, Extraction]:
    """`extract` with a progress bar; `dtype` is one of DTYPES."""
    import torch

    from ..sentences import nearest

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}{nearest(dtype, DTYPES)}")
    kind = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16)))[dtype]
    with progress("extracting") as report:
        return extract(base, finetuned, output, rank, energy, device, kind, report)


def show(found: Extraction) -> None:
    """Prints the table: what each layer lost, and what changed without a place in the LoRA."""
    from rich.table import Table

    from ..console import wide

    console = wide()
    table = Table(box=None)
    for head in ("layer", "rank", "change", "residual"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    for change in found.held:
        table.add_row(change.name, str(change.rank), _percent(change.change), _percent(change.residual))
    console.print(table, highlight=False)
    if found.left:
        table = Table(box=None, title="changed, and not in the LoRA", title_justify="left")
        table.add_column("tensor")
        table.add_column("change", justify="right")
        for change in found.left:
            table.add_row(change.name, _percent(change.change))
        console.print(table, highlight=False)


def summary(found: Extraction) -> str:
    """One line: how many layers, which rank, what was lost."""
    adapter = found.adapter
    lines = f"{len(adapter)} layers, rank {adapter.rank}, {adapter.parameters:,} numbers"
    return f"{lines}; residual {_percent(found.residual)} of the change" + _worst(found.held)


def _worst(held: tuple[Change, ...]) -> str:
    worst = max(held, key=lambda change: change.residual)
    return f" (worst layer {worst.name}, {_percent(worst.residual)})"


def _percent(share: float) -> str:
    return "new" if share == float("inf") else f"{share:.2%}"
