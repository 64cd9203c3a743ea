"""The bench in a terminal: models as rows, categories as columns, in as many tables as fit the width.

The student's row stands out, the best of each column is bold, and below stand the gap closed, the worst category,
subsets, what has no score, and the suite's ceiling. Fits into 80 columns, and piped output carries no colour.
Everything is read from the plain `scores` of a result, so a saved `scores.json` prints the same table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from danceopd.bench import standing
from danceopd.console import wide
from danceopd.progress import clock

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
    "material_alter": "material",
    "motion_change": "motion",
    "ps_human": "human",
    "text_change": "text",
    "tone_transfer": "tone",
}
COLUMNS = 6
"""Categories in one table; more of them go on in another one below."""
PLAIN_EVERY = 15.0
"""Seconds between lines of progress where there is no terminal to draw on."""


def short(category: str) -> str:
    """A column head of at most 8 letters."""
    return SHORT.get(category, category.replace("_", " ").replace("-", " ")[:8].strip())


def heads(categories: Sequence[str]) -> list[str]:
    """Column heads, each of at most 8 letters and none twice."""
    found: list[str] = []
    for category in categories:
        head = short(category)
        again = (f"{head[:7]}{n}" for n in range(2, 100))
        found.append(head if head not in found else next(other for other in again if other not in found))
    return found


def number(value: float | None, capability: str, sign: bool = False) -> str:
    """A score as it is printed everywhere, with two digits; a dash where there is none."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.2f}"


def _tables(scores: dict, capability: str) -> list[RenderableType]:
    """A title and one table, or several where there are many categories; the last has the overall score."""
    models = [m for m in scores["models"] if m.get(capability)]
    categories = list(dict.fromkeys(c for m in models for c in m[capability]["categories"]))
    if not categories:
        return []
    every = dict(zip(categories, heads(categories)))
    parts = -(-len(categories) // COLUMNS)
    size = -(-len(categories) // parts)
    cut = [categories[at : at + size] for at in range(0, len(categories), size)]
    title = f"{standing.CAPABILITIES[capability]} ({standing.measure(scores, capability)})"
    made: list[RenderableType] = [Text(title, style="bold")]
    for part in cut:
        made += [_table(scores, capability, models, {c: every[c] for c in part}, last=part is cut[-1]), Text()]
    return made


def _table(scores: dict, capability: str, models: list[dict], columns: dict[str, str], last: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        show_edge=False,
    )
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=16)
    for head in columns.values():
        table.add_column(head, justify="right", no_wrap=True)
    if last:
        whole = "O" if standing.scale(scores, capability) == (0.0, 10.0) else "all"
        table.add_column(whole, justify="right", no_wrap=True)
        table.add_column("± 95%", justify="right", no_wrap=True, style="dim")

    def cells(model: dict) -> list[str]:
        found = model[capability]
        values = [found["categories"].get(c, {}).get("mean") for c in columns]
        return [number(v, capability) for v in (*values, *([found["overall"]["mean"]] if last else []))]

    rows = [cells(m) for m in models]
    best = [max((c for c in column if c != "-"), key=float, default=None) for column in zip(*rows)]
    for model, values in zip(models, rows):
        is_student = model["role"] == "student"
        row = [Text("student" if is_student else model["label"], style="bold magenta" if is_student else "")]
        for value, top in zip(values, best):
            style = ("bold " if value == top else "") + ("magenta" if is_student else "")
            row.append(Text(value, style=style.strip()))
        if last:
            low, high = (model[capability]["overall"][end] for end in ("low", "high"))
            row.append(Text("-" if low is None else number((high - low) / 2, capability)))
        table.add_row(*row, end_section=model is models[-1])
    ceiling = (scores.get("ceiling") or {}).get(capability)
    if ceiling:
        tops = [*(ceiling["categories"].get(c) for c in columns), *([ceiling["overall"]] if last else [])]
        cells_of = [number(v, capability) for v in tops]
        table.add_row(*[Text(text, style="dim") for text in ("ceiling", *cells_of, *([""] if last else []))])
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
    low, high = (number(found.get(k), capability, sign=True) for k in ("low", "high"))
    return (
        f"{found['category']} {number(found['mean'], capability, sign=True)} ({low} to {high}) "
        f"against {found['teacher']}"
    )


def unscored_sentence(found: dict, capability: str) -> str:
    """How many pictures of a model have no score, and what that leaves open."""
    return (
        f"{found['label']}: {found['failed']} of {found['failed'] + found['n']}, so its score is between "
        f"{number(found['lower'], capability)} and {number(found['upper'], capability)}"
    )


def table(scores: dict) -> RenderableType:
    """The tables and the lines below them, for any rich console."""
    parts: list[RenderableType] = []
    for capability in standing.CAPABILITIES:
        parts += _tables(scores, capability)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for title, key in (("gap closed", "gap_closed"), ("worst category", "worst")):
        for capability, found in scores["comparison"].items():
            if found is None:
                continue
            words = gap_sentence(found[key]) if key == "gap_closed" else worst_sentence(found[key], capability)
            lines.add_row(title, capability, words)
            title = ""
    for name, found in (scores.get("subsets") or {}).items():
        for capability, by_model in found.items():
            if scores["student"] in by_model:
                figure = by_model[scores["student"]]
                lines.add_row(f"subset {name}", capability, f"{number(figure['mean'], capability)} (n={figure['n']})")
    for title, found in (scores.get("probes") or {}).items():
        student = found["models"].get(scores["student"])
        if student:
            lines.add_row(
                f"probe {title}",
                found["capability"],
                f"{number(student['mean'], found['capability'])} (n={student['n']})",
            )
    for capability in standing.CAPABILITIES:
        for lost in standing.unscored(scores, capability):
            lines.add_row("without a score", capability, unscored_sentence(lost, capability))
    parts.append(lines)
    if scores.get("ceiling"):
        parts.append(
            Text("ceiling: what the suite reads from perfect pictures after the autoencoder's round trip", style="dim")
        )
    return Group(*parts)


def print_table(scores: dict, console: Console | None = None) -> None:
    """Print the tables to a console (standard output)."""
    (console or wide(soft_wrap=False)).print(table(scores), highlight=False)


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an ETA as the `progress` of `bench`; a line now and then where the console is no terminal."""
    console = console or Console(stderr=True, markup=False)
    if not console.is_terminal:
        yield _lines(console)
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    ) as bars:
        task: Any = bars.add_task("bench", total=None)
        phase = ""

        def step(done: int, total: int, what: str) -> None:
            nonlocal phase
            if what.split()[0] != phase:  # another kind of work, with a pace of its own
                phase = what.split()[0]
                bars.reset(task, total=total)
            bars.update(task, completed=done, total=total, description=f"bench · {what}")

        yield step


def _lines(console: Console) -> Callable[[int, int, str], None]:
    """The progress of long work as lines, the first after a while: quick work says nothing."""
    phase, began, start, last = "", 0.0, 0, time.monotonic()

    def step(done: int, total: int, what: str) -> None:
        nonlocal phase, began, start, last
        now = time.monotonic()
        if what.split()[0] != phase:
            phase, began, start = what.split()[0], now, done
        if now - last >= PLAIN_EVERY:
            last = now
            left = f", {clock((now - began) / (done - start) * (total - done))} left" if done > start else ""
            console.print(f"bench: {what}, {done} of {total}{left}", highlight=False, soft_wrap=True)

    return step
