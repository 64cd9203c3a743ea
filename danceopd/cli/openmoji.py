"""`danceopd openmoji fetch`: get the drawings that the benchmark suite openmoji needs, and print their attribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli.boundary import echo
from danceopd.cli.flags import App

app = App(help="Get the drawings for the benchmark suite openmoji.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Get the drawings for the benchmark suite openmoji."""


@app.command()
def fetch(
    package: Annotated[
        Path | None, typer.Option("--from", help="The package file openmoji-17.0.0.tgz, when you have it already.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the drawings; default: the cache.")
    ] = None,
) -> None:
    """Download the npm package openmoji (CC BY-SA 4.0) once, and check its sha256.

    Example: danceopd openmoji fetch -o drawings
    """
    from danceopd.worlds.openmoji.fetch import ATTRIBUTION
    from danceopd.worlds.openmoji.fetch import fetch as run

    echo(f"drawings: {run(package, output)}")
    echo(ATTRIBUTION)
