"""The progress of a training, a bench and quick work, on a terminal and elsewhere."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from io import StringIO

import pytest
from rich.console import Console

from danceopd.common import console as module
from danceopd.common.console import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` says, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(clock: list[float], seconds: float, **options: bool) -> list[str]:
    """What four steps print without a terminal, one every so many seconds."""
    out = StringIO()
    with progress_bar("merging", Console(file=out, width=80), **options) as report:
        for step in range(1, 5):
            report(step, 4, "loss 0.5")
            clock[0] += seconds
    return [line.split()[1] for line in out.getvalue().splitlines()]


def test_a_training_prints_its_first_and_its_last_step(clock: list[float]) -> None:
    assert lines(clock, 1, ends=True) == ["1/4", "4/4"]
    assert lines(clock, 10, ends=True) == ["1/4", "3/4", "4/4"]


def test_quick_work_prints_nothing(clock: list[float]) -> None:
    assert lines(clock, 1) == [] and lines(clock, 10) == ["3/4"]


def test_a_bar_shows_the_time_of_its_phase_and_may_vanish(clock: list[float]) -> None:
    """Twenty seconds of generating, then five of scoring."""
    shown = {}
    for transient in (False, True):
        out = StringIO()
        console = Console(file=out, width=100, force_terminal=True, color_system=None, get_time=lambda: clock[0])
        with progress_bar("bench", console, transient=transient) as report:
            report(0, 8, "generating")
            clock[0] += 20
            report(8, 8, "generating")
            report(0, 4, "scoring")
            clock[0] += 5
            report(2, 4, "scoring")
        shown[transient] = out.getvalue()
    assert "2/4 0:00:05 0:05 left  scoring" in shown[False]
    assert shown[True].endswith("\x1b[1A\x1b[2K")  # the line is erased


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_with_widgets_gets_a_bar_and_another_gets_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, widgets: bool
) -> None:
    drawn: list[object] = []

    class Output:
        def __enter__(self) -> Output:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        clear_output = staticmethod(lambda wait: None)

    stub = {"IPython": {}, "IPython.display": {"display": drawn.append}, "ipywidgets": {"Output": Output}}
    for name, content in stub.items():
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
    if not widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    out = StringIO()
    notebook = Console(file=out, width=100, force_jupyter=True)
    monkeypatch.setattr(notebook, "print", lambda *what, **_: out.write(f"{what[0]}\n"))
    with progress_bar("merging", notebook, ends=True) as report:
        report(1, 2, "loss 0.5")
        report(2, 2, "loss 0.4")
    assert bool(drawn) == widgets
    assert ("merging 1/2" in out.getvalue()) == (not widgets)
