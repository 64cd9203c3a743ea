"""The command `ui`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli.boundary import echo
from danceopd.cli.flags import Base, Device
from danceopd.errors import UserError


def ui(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of finished merges, or LoRAs; a tab each.")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    host: Annotated[
        str, typer.Option(help="Who may open the page: 127.0.0.1 this machine alone, 0.0.0.0 whoever reaches it.")
    ] = "127.0.0.1",
    base: Base = None,
    device: Device = None,
) -> None:
    """Open a page in the browser: look at a run, move the strength of student and teachers, compare from one noise.

    Example: danceopd ui student --port 7860
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio, which is not installed; pip install 'danceopd[ui]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from danceopd.cli.ui.page import launch, page

    made = page(runs, base, device)
    address = launch(made, port, host, [run for run in runs if run.is_dir()])
    echo(f"{address} (Ctrl-C ends it)")
    try:
        made.block_thread()
    finally:
        made.close(verbose=False)
