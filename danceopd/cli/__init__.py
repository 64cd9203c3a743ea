"""The command line: one thin module for each command, imported when the command runs, so that `--help` loads no torch.

In: arguments. Out: calls of the public functions, tables on the terminal, and exit status 2 with one sentence for an
error that a user can mend. Read `app.py` first.
"""

from danceopd.cli.app import main

__all__ = ["main"]
