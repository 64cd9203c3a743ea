"""The bench in a terminal: one table a capability, models as rows, categories as columns.

The student's row stands out, the best of each column is bold, and below stand the gap closed, the worst
category and the suite's ceiling. Fits into 80 columns, and piped output carries no colour. Everything is read
from the plain `scores` of a result, so a saved `scores.json` prints the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SHORT = {
    "single_object": "single",
    "two_object": "two",
    "counting": "count",
    "colors": "color",
    "position": "place",
    "color_attr": "attr",
    "subject-add": "add",
    "subject-remove": "remove",
    "subject-replace": "swap",
    "background_change": "backgr",
    "style_change": "style",
    "color_alter": "color",
}
OVERALL = {"generation": "all", "editing": "O"}
TITLE = {"generation": "Generation (share correct)", "editing": "Editing (O, 0 to 10)"}


def short(category: str) -> str:
    """A column head of at most 8 letters."""
    return SHORT.get(category, category.replace("_", " ").replace("-", " ")[:8].strip())


def number(value: float, capability: str, sign: bool = False) -> str:
    """A score as it is printed everywhere: shares with two digits, O with two digits."""
    return f"{value:{'+' if sign else ''}.2f}"


def _capability_table(scores: dict, capability: str) -> Table | None:
    models = [m for m in scores["models"] if m.get(capability)]
    if not models:
        return None
    categories = list(models[0][capability]["categories"])
    table = Table(
        title=TITLE.get(capability, capability),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        show_edge=False,
    )
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=16)
    for category in categories:
        table.add_column(short(category), justify="right", no_wrap=True)
    table.add_column(OVERALL.get(capability, "all"), justify="right", no_wrap=True)
    table.add_column("± 95%", justify="right", no_wrap=True, style="dim")

    def cells(model: dict) -> list[str]:
        found = model[capability]
        values = [found["categories"].get(c, {}).get("mean") for c in categories] + [found["overall"]["mean"]]
        return ["-" if v is None else number(v, capability) for v in values]

    rows = [cells(m) for m in models]
    best = [max((c for c in column if c != "-"), key=float, default=None) for column in zip(*rows)]
    for model, values in zip(models, rows):
        is_student = model["role"] == "student"
        row = [Text("student" if is_student else model["label"], style="bold magenta" if is_student else "")]
        for value, top in zip(values, best):
            style = ("bold " if value == top else "") + ("magenta" if is_student else "")
            row.append(Text(value, style=style.strip()))
        overall = model[capability]["overall"]
        row.append(Text(number((overall["high"] - overall["low"]) / 2, capability)))
        table.add_row(*row, end_section=model is models[-1])
    ceiling = (scores.get("ceiling") or {}).get(capability)
    if ceiling:
        tops = [*(ceiling["categories"].get(c) for c in categories), ceiling["overall"]]
        cells_of = ["-" if v is None else number(v, capability) for v in tops]
        table.add_row(*[Text(text, style="dim") for text in ("ceiling", *cells_of, "")])
    return table


def percent(value: float | None) -> str:
    """A share as whole percents."""
    return "-" if value is None else f"{round(100 * value)} %"


def gap_sentence(found: dict | None) -> str:
    """The gap closed, in words."""
    if not found:
        return "no base and teacher to measure it"
    if found["share"] is None:
        return f"{found['teacher']} is not ahead of the base: no gap"
    return (
        f"{percent(found['share'])} ({percent(found['low'])} to {percent(found['high'])}) of base to {found['teacher']}"
    )


def worst_sentence(found: dict | None, capability: str) -> str:
    """The worst category against the best teacher there, in words."""
    if not found:
        return "no teacher to compare with"
    low, high = (number(found[k], capability, sign=True) if k in found else "?" for k in ("low", "high"))
    return (
        f"{found['category']} {number(found['mean'], capability, sign=True)} ({low} to {high}) "
        f"against {found['teacher']}"
    )


def table(scores: dict) -> RenderableType:
    """The tables and the lines below them, for any rich console."""
    parts: list[RenderableType] = []
    for capability in ("generation", "editing"):
        found = _capability_table(scores, capability)
        if found is not None:
            parts += [found, Text()]
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for title, key in (("gap closed", "gap_closed"), ("worst category", "worst")):
        for capability, found in scores["comparison"].items():
            words = gap_sentence(found[key]) if key == "gap_closed" else worst_sentence(found[key], capability)
            lines.add_row(title, capability, words)
            title = ""
    for title, found in (scores.get("probes") or {}).items():
        student = found["models"].get(scores["student"])
        if student:
            lines.add_row(
                f"probe {title}",
                found["capability"],
                f"{number(student['mean'], found['capability'])} (n={student['n']})",
            )
    parts.append(lines)
    if scores.get("ceiling"):
        parts.append(
            Text("ceiling: what the suite reads from perfect pictures after the autoencoder's round trip", style="dim")
        )
    return Group(*parts)


def print_table(scores: dict, console: Console | None = None) -> None:
    """Print the tables to a console (standard output)."""
    (console or Console()).print(table(scores), highlight=False)


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an ETA as the `progress` of `bench`; prints nothing where the console is no terminal."""
    console = console or Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        task: Any = bars.add_task("bench", total=None)

        def step(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=f"bench · {what}")

        yield step
