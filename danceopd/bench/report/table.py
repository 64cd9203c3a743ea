"""The result in a terminal: models as rows, categories as columns, in as many tables as the width needs.

The student's row is highlighted and the best of each column bold. Below the tables are the verdict, the gap closed, the
worst category, subsets, probes, images without a score and why, edits of another shape, and the suite's ceiling. The
output fits into 80 columns and has no colours when it is piped. Everything is read from `scores.json`, so a saved one
prints the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from danceopd.bench.report import facts
from danceopd.bench.report.verdict import SIGN, verdict_of, where
from danceopd.common.console import wide_console

SHORT = {
    "single_object": "single",
    "two_object": "two",
    "counting": "count",
    "colors": "color",
    "color_attr": "attr",
    "subject-add": "add",
    "subject-remove": "remove",
    "subject-replace": "replace",
    "background_change": "backgr",
    "style_change": "style",
    "color_alter": "color",
    "material_alter": "material",
    "motion_change": "motion",
    "ps_human": "human",
    "text_change": "text",
    "tone_transfer": "tone",
}
SHAPE = "{} of the edits have another aspect ratio than their source; where the suite resizes, they are stretched"
COLUMNS = 6
"""Categories in one table; more of them continue in another one below."""


def short(category: str) -> str:
    """A column head of at most 8 characters."""
    return SHORT.get(category, category.replace("_", " ").replace("-", " ")[:8].strip())


def heads(categories: Sequence[str]) -> list[str]:
    """Column heads, each of at most 8 characters and all different."""
    found: list[str] = []
    for category in categories:
        head = short(category)
        again = (f"{head[:7]}{n}" for n in range(2, 100))
        found.append(head if head not in found else next(other for other in again if other not in found))
    return found


def number(value: float | None, sign: bool = False) -> str:
    """A score with two digits; a dash for None."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.2f}"


def _tables(scores: Mapping[str, Any], capability: str) -> list[RenderableType]:
    """A title and one table, or several for many categories; the last one has the overall score."""
    models = [m for m in scores["models"] if m.get(capability)]
    categories = list(dict.fromkeys(c for m in models for c in m[capability]["categories"]))
    if not categories:
        return []
    every = dict(zip(categories, heads(categories)))
    parts = -(-len(categories) // COLUMNS)
    size = -(-len(categories) // parts)
    cut = [categories[at : at + size] for at in range(0, len(categories), size)]
    title = f"{facts.CAPABILITIES[capability]} ({facts.measure(scores, capability)})"
    made: list[RenderableType] = [Text(title, style="bold")]
    for part in cut:
        made += [_table(scores, capability, models, {c: every[c] for c in part}, last=part is cut[-1]), Text()]
    return made


def _table(
    scores: Mapping[str, Any], capability: str, models: list[dict], columns: dict[str, str], last: bool
) -> Table:
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
        table.add_column("mean", justify="right", no_wrap=True)
        table.add_column("± 95%", justify="right", no_wrap=True, style="dim")

    def cells(model: dict) -> list[str]:
        found = model[capability]
        values = [found["categories"].get(c, {}).get("mean") for c in columns]
        return [number(v) for v in (*values, *([found["overall"]["mean"]] if last else []))]

    rows = [cells(m) for m in models]
    best = [max((c for c in column if c != "-"), key=float, default=None) for column in zip(*rows)]
    for model, values in zip(models, rows):
        is_student = model["role"] == "student"
        row = [Text(model["label"], style="bold magenta" if is_student else "")]
        for value, top in zip(values, best):
            style = ("bold " if value == top else "") + ("magenta" if is_student else "")
            row.append(Text(value, style=style.strip()))
        if last:
            low, high = (model[capability]["overall"][end] for end in ("low", "high"))
            row.append(Text("-" if low is None else number((high - low) / 2)))
        table.add_row(*row, end_section=model is models[-1])
    counts = [_count(facts.student_of(scores), capability, c) for c in (*columns, *([None] if last else []))]
    table.add_row(*[Text(text, style="dim") for text in ("items", *counts, *([""] if last else []))])
    ceiling = (scores.get("ceiling") or {}).get(capability)
    if ceiling:
        tops = [*(ceiling["categories"].get(c) for c in columns), *([ceiling["overall"]] if last else [])]
        cells_of = [number(v) for v in tops]
        table.add_row(*[Text(text, style="dim") for text in ("ceiling", *cells_of, *([""] if last else []))])
    return table


def _count(model: dict, capability: str, category: str | None) -> str:
    """The items of a category (None: of all) of a model, scored or not."""
    found = model.get(capability)
    of = found and (found["overall"] if category is None else found["categories"].get(category))
    return str(of["n"] + (of.get("failed") or 0)) if of else "-"


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    return "-" if value is None else f"{round(100 * value)} %"


def gap_sentence(found: dict | None) -> str:
    """The gap closed, as a sentence."""
    if not found:
        return "no base or no teacher to measure it"
    if found["share"] is None:
        return f"{found['teacher']} is not better than the base: there is no gap"
    interval = f"{percent(found['low'])} to {percent(found['high'])}"
    return f"{percent(found['share'])} ({interval}) of the gap from base to {found['teacher']}"


def unscored_sentence(found: dict) -> str:
    """How many images of a model have no score, and the bounds of its mean, as a sentence."""
    return (
        f"{found['label']}: {found['failed']} of {found['failed'] + found['n']}, so its score is between "
        f"{number(found['lower'])} and {number(found['upper'])}"
    )


def why_unscored(found: dict) -> str:
    """One reason of `results.unscored`, as a line."""
    return f"no score: {found['reason'] or 'no reason was given'} ({found['status']}, {found['count']} times)"


def table(scores: dict) -> RenderableType:
    """The tables and the lines below them."""
    parts: list[RenderableType] = []
    for of, capability in facts.measures(scores).values():
        parts += _tables(of, capability)
    told = verdict_of(scores)
    parts += [Text(f"{SIGN[told['kind']]} {told['sentence']}", style="bold"), Text()]
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    title = "gap closed"
    for measured, (of, capability) in facts.measures(scores).items():
        if found := (of.get("comparison") or {}).get(capability):
            lines.add_row(title, measured, gap_sentence(found.get("gap_closed")))
            title = ""
    title = "worst category"
    for capability, found in told["worst"].items():
        lines.add_row(title, capability, where(found))
        title = ""
    for name, found in (scores.get("subsets") or {}).items():
        for capability, by_model in found.items():
            if figure := by_model.get(scores.get("student")):
                lines.add_row(f"subset {name}", capability, f"{number(figure['mean'])} (n={figure['n']})")
    for title, found in (scores.get("probes") or {}).items():
        student = found["models"].get(scores.get("student"))
        if student:
            lines.add_row(
                f"probe {title}",
                found["capability"],
                f"{number(student['mean'])} (n={student['n']})",
            )
    for capability in facts.CAPABILITIES:
        for lost in facts.unscored(scores, capability):
            lines.add_row("without a score", capability, unscored_sentence(lost))
    for capability, by_model in (scores.get("metrics") or {}).items():
        for model in scores["models"]:
            share = ((by_model.get(model["name"]) or {}).get("aspect_changed") or {}).get("mean")
            if share:
                lines.add_row("another shape", capability, f"{model['label']}: {SHAPE.format(percent(share))}")
    parts.append(lines)
    if scores.get("ceiling"):
        parts.append(Text("ceiling: the score of correct images after the autoencoder's round trip", style="dim"))
    return Group(*parts)


def print_table(scores: dict, console: Console | None = None) -> None:
    """Print the tables to a console, by default standard output."""
    console = console or wide_console(soft_wrap=False)
    console.print(table(scores), highlight=False)
    for why in scores.get("unscored") or ():
        console.print(why_unscored(why), highlight=False, soft_wrap=True)
