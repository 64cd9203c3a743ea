"""One line that says how far a training is, what its loss is, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Report = Callable[[int, int, float], None]
"""``report(step, steps, loss)``"""

PLAIN_EVERY = 15.0
"""Seconds between lines where there is no terminal to draw on."""


def clock(seconds: float) -> str:
    """``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Left:
    """Time left, from the pace since the first report (a continued run starts in the middle)."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None

    def __call__(self, step: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, step)
        began, start = self.first
        return "…" if step == start else clock((now - began) / (step - start) * (total - step))


@contextmanager
def progress_line(title: str) -> Iterator[Report]:
    """A report that draws a bar with the time left on a terminal, and prints a line now and then elsewhere."""
    console, left = Console(stderr=True), _Left()
    if not console.is_terminal:
        last = -PLAIN_EVERY

        def line(step: int, total: int, loss: float) -> None:
            nonlocal last
            remaining, now = left(step, total), time.monotonic()
            if now - last >= PLAIN_EVERY or step == total:
                last = now
                print(f"{title} {step}/{total}  loss {loss:.4f}  {remaining} left", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[bold]{task.fields[left]}[/] left  loss {task.fields[loss]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, left="…", loss="…")

        def report(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, left=left(step, total), loss=f"{loss:.4f}")

        yield report
