"""The command line: one thin module a command, each imported when it runs, so that `--help` never waits for torch.

In: arguments. Out: calls of the public functions, tables on the terminal, and exit status 2 with one sentence for what
a user can mend. Read `app.py` first.
"""

from danceopd.cli.app import main

__all__ = ["main"]
