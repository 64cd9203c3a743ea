"""The command line: one thin module for each command, imported when the command runs, so that `--help` loads no torch.

In: arguments. Out: calls of the public functions, tables on the terminal, and exit status 2 with one sentence for an
error that a user can mend. Read `app.py` first; `boundary.py` is how a command ends.
"""

import importlib
import sys
from typing import Any

from danceopd.common.signals import Stopped, end_on_signals, raise_on_signals

__all__ = ["main"]


def main() -> None:
    """The `danceopd` program; a signal ends it with 128 + its number from the first import on."""
    status = 0
    raise_on_signals()
    try:
        from danceopd.cli.app import main as run

        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except (KeyboardInterrupt, Stopped) as stopped:
        status = 128 + getattr(stopped, "number", 2)
        print("\nstopped", file=sys.stderr)
    end_on_signals(status)
    raise SystemExit(status)


def __getattr__(name: str) -> Any:
    """`danceopd.cli.app`, imported when it is asked for: `main` handles signals before anything else is there."""
    if name == "app":
        return importlib.import_module("danceopd.cli.app")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
