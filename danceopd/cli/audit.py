"""`danceopd audit`: which signals rank the model's own samples, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danceopd.recipe.recipe import Recipe


def run(recipe: Recipe, output: Path | None, levels: list[float], judge: str | None, **asked: Any) -> dict[str, Any]:
    """Audit a recipe with a progress bar; returns the contents of audit.json, and the folder as `folder`."""
    from danceopd.audit import Options, audit
    from danceopd.bench.options import JudgeOptions
    from danceopd.common.console import progress_bar
    from danceopd.labelfree.audit.summary import audit_folder

    given = {key: value for key, value in (asked | {"levels": levels or None}).items() if value is not None}
    options = Options(**given, judge=JudgeOptions(judge))
    with progress_bar("auditing", ends=True) as bar:
        facts = audit(recipe, options, output, bar)
    return facts | {"folder": str(output or audit_folder(recipe.output))}


def show(facts: dict[str, Any]) -> None:
    """Print the tables."""
    from rich import box
    from rich.table import Table

    from danceopd.common.console import wide_console
    from danceopd.labelfree.audit.table import tables

    console = wide_console(least=120)
    for title, below, heads, rows in tables(facts):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        table.pad_edge, table.padding = False, (0, 1)
        for place, head in enumerate(heads):
            table.add_column(head, justify="left" if place < 2 else "right", no_wrap=place != 1)
        for row in rows:
            table.add_row(*row)
        console.print(table, highlight=False)
        console.print(below, style="dim", highlight=False)
        console.print()
