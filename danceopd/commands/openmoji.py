"""`danceopd openmoji`: the drawings that suite openmoji needs, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The drawings that the bench's suite openmoji needs.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The drawings that the bench's suite openmoji needs."""


@app.command()
def fetch(
    package: Annotated[
        Path | None, typer.Option("--from", help="The package's file, where it is here already (openmoji-17.0.0.tgz).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the drawings; default: the cache.")
    ] = None,
) -> None:
    """Fetch npm package openmoji (CC BY-SA 4.0) once, checked against its known checksum."""
    from danceopd.openmoji.fetch import ATTRIBUTION, fetch

    typer.echo(f"drawings: {fetch(package, output)}")
    typer.echo(ATTRIBUTION)
