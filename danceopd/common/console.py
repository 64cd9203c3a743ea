"""The terminal: a progress bar with the time left, and a console that is wide enough for tables."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

PRINT_INTERVAL = 15.0
"""Seconds between progress lines where standard error is no terminal."""
MIN_WIDTH = 80
"""Columns that most tables fit into."""
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


_hidden = False


def hide_progress() -> None:
    """No progress is printed from here on."""
    global _hidden
    _hidden = True


class _Plain(Console):
    """A console that prints names from files without what would move the cursor."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


def printable(text: str) -> str:
    """`text` with the characters that control a terminal, or turn the direction of writing, as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def wide_console(soft_wrap: bool = True, least: int = MIN_WIDTH) -> Console:
    """Standard output, as wide as the terminal and at least `least`; text in square brackets is not markup."""
    return _Plain(width=max(least, Console().width), soft_wrap=soft_wrap, markup=False)


def format_seconds(seconds: float) -> str:
    """``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(
    title: str, console: Console | None = None, ends: bool = False, transient: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    """A context with a function `report(done, total, note)` that draws a bar with the time left on a terminal's stderr,
    and in a notebook that has ipywidgets.

    Elsewhere it prints a line every `PRINT_INTERVAL` seconds, so that quick work prints nothing; with `ends` also the
    first report and the last one. `transient`: the bar vanishes when the work is done. The first word of `note` names a
    phase: the time since its start and the time left are those of the phase, from its own pace since its first report.
    """
    console = console or Console(stderr=True, markup=False)
    began, start, phase, last = 0.0, 0, "", -math.inf if ends else time.monotonic()

    def left(done: int, total: int, note: str) -> str:
        nonlocal began, start, phase
        now, word = time.monotonic(), (note.split() or ["-"])[0]
        if word != phase:
            phase, began, start = word, now, done
        return format_seconds((now - began) / (done - start) * (total - done)) if done > start else "…"

    def line(done: int, total: int, note: str) -> None:
        nonlocal last
        remaining, now = left(done, total, note), time.monotonic()
        if now - last >= PRINT_INTERVAL or (ends and done == total):
            last = now
            parts = (f"{title} {done}/{total}", note, f"{remaining} left")
            console.print("  ".join(filter(None, parts)), highlight=False, soft_wrap=True)

    if _hidden:
        yield lambda done, total, note: None
        return
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left  {task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task(title, total=None, left="…", note="")

        def draw(done: int, total: int, note: str) -> None:
            before, remaining = phase, left(done, total, note)
            if before not in ("", phase):
                bar.reset(task)
            bar.update(task, completed=done, total=total, left=remaining, note=note)

        yield draw
