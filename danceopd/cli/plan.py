"""`danceopd plan`: what a merge would take, as tables."""

from __future__ import annotations

from typing import Any

from danceopd.common.system import gigabytes


def show(facts: dict[str, Any]) -> None:
    """Prints what `plan.plan` found."""
    from rich.table import Table

    from danceopd.common.console import wide_console

    console = wide_console(least=100)

    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        made = Table(title=title, title_justify="left", box=None, header_style="bold", title_style="bold")
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i and column else "left", no_wrap=True)
        for row in rows:
            made.add_row(*row)
        console.print(made, highlight=False)
        console.print()

    student = facts["student"]
    console.print(
        f"{facts['transformer']} ({facts['family']}), {facts['parameters'] / 1e6:,.1f}M parameters in "
        f"{facts['dtype']}{_kept(facts)}; student of rank {student['rank']} on {student['modules']} layers, "
        f"{student['parameters'] / 1e6:,.2f}M",
        highlight=False,
    )
    console.print()
    table(
        "Teachers",
        ["name", "kind", "rank", "guidance", "share", "rows", "sampled", "data"],
        [
            [t["name"], t["kind"], str(t["rank"]), "" if t["guidance"] is None else f"{t['guidance']:g}",
             f"{t['share']:.0%}", f"{t['rows']:,}", f"{t['drawn']:,}", _data(t)]
            for t in facts["teachers"]
        ],
    )  # fmt: skip
    table(
        "Image sizes",
        ["capability", "h x w", "share", "tokens", "source", "text <=", "TFLOP per row"],
        [
            [p["capability"], f"{p['size'][0]} x {p['size'][1]}", f"{p['share']:.0%}", str(p["picture"]),
             str(p["source"]), str(p["text"]), f"{p['flops'] / 1e12:.3g}"]
            for p in facts["pictures"]
        ],
    )  # fmt: skip
    levels = facts["queries"]["levels"]
    if levels:
        bins = [f"{i / len(levels):.1f}-{(i + 1) / len(levels):.1f}" for i in range(len(levels))]
        table(
            f"Queries by noise level (a rollout takes {facts['queries']['depth']:.2f} steps on average)",
            ["sigma", "share", ""],
            [[b, f"{s:.1%}", "#" * round(40 * s)] for b, s in zip(bins, levels)],
        )
    phases = list(facts["peak"])
    mark = lambda m: "at times: " * m["passing"] + m["part"]  # noqa: E731
    table(
        f"Memory on {facts['device']} ({gigabytes(facts['machine_memory'])}); of what is there at times the largest "
        "counts",
        ["part", *phases],
        [
            *([mark(m), *(gigabytes(m["bytes"]) if key in m["when"] else "" for key in phases)]
              for m in facts["memory"]),
            ["total", *(gigabytes(facts["peak"][key]) for key in phases)],
        ],
    )  # fmt: skip
    seconds = facts["seconds"]
    table(
        f"Time, at {facts['tflops']:.3g} TFLOP/s (a lower bound)",
        ["part", "forward passes per row", "TFLOP", "seconds"],
        [
            *(
                [part, f"{facts['passes'][part]:.2f}", f"{facts['flops'][part] / 1e12:.3g}", f"{seconds[part]:.3g}"]
                for part in seconds
            ),
            ["total", f"{sum(facts['passes'].values()):.2f}", f"{sum(facts['flops'].values()) / 1e12:.3g}",
             f"{sum(seconds.values()):.3g}"],
        ],
    )  # fmt: skip
    sources = facts["sources"]
    if sources["pictures"]:
        console.print(
            f"sources of edits: {sources['pictures']:,} pictures are drawn first, at least "
            f"{_duration(sources['seconds'])} ({sources['forwards']:,} forward passes)", highlight=False,
        )  # fmt: skip
    whole = ", with the sources" if sources["pictures"] else ""
    console.print(f"{facts['steps']:,} updates{whole}: at least {_duration(facts['total_seconds'])}", highlight=False)
    disk = facts["disk"]
    console.print(
        f"disk: run folder {gigabytes(disk['run'])} of {gigabytes(disk['run_free'])} free, cache up to "
        f"{gigabytes(disk['cache'])} of {gigabytes(disk['cache_free'])} free",
        highlight=False,
    )
    for note in facts["notes"]:
        console.print(f"note: {note}", highlight=False)
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def _kept(facts: dict[str, Any]) -> str:
    """How the frozen base is kept, where that is not whole and on the card."""
    kept = f", Linear layers in {facts['base_dtype']}" if facts["base_dtype"] else ""
    return kept + (", its blocks in the computer's memory" if facts["offload"] == "blocks" else "")


def _data(teacher: dict[str, Any]) -> str:
    """A teacher's data, and which of its columns are read as what."""
    columns = ", ".join(f"{what}: {name}" for what, name in teacher["columns"].items())
    return teacher["source"] + (f" ({columns})" if columns else "")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
