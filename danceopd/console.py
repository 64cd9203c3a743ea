"""The console that tables are printed to: never so narrow that numbers are cut; a narrow terminal wraps the lines."""

from __future__ import annotations

from rich.console import Console

LEAST = 80
"""Columns that every table fits into."""


def wide(soft_wrap: bool = True) -> Console:
    """Standard output, as wide as the terminal or `LEAST`; nothing in square brackets is markup."""
    return Console(width=max(LEAST, Console().width), soft_wrap=soft_wrap, markup=False)
