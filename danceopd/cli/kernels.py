"""What there is on this machine: the commands `danceopd kernels`, which says what would run and runs nothing,
`danceopd version` and `danceopd schema`; and the options of `danceopd` itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from danceopd.cli.boundary import echo
from danceopd.cli.flags import Json, Quiet, Verbose, hush, print_json, raise_voice
from danceopd.errors import UserError


def describe() -> dict[str, str]:
    """The rows of the table: what `DANCEOPD_KERNELS` requests, what would run, and why a backend would not.

    UserError if a backend is requested that does not exist or cannot run here.
    """
    from importlib import metadata

    import torch

    from danceopd.common.cache import cache_folder
    from danceopd.kernels import attention, attention_backends, backend
    from danceopd.kernels.cuda import build

    cuda = torch.cuda.is_available() and torch.version.cuda is not None
    device = "cuda" if cuda else "cpu"
    backend.check_requested()
    name = backend.requested()
    facts = {"requested": f"{name} ({backend.VARIABLE})" if backend.VARIABLE in os.environ else name}
    facts["runs"] = {
        "cuda": "CUDA kernels, compiled on first use",
        "triton": "Triton kernels, compiled on first use",
        "torch": "plain torch",
    }[backend.active(device)]
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        facts["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        facts["device"] = "cpu"
    for name in ("cuda", "triton"):
        reason = backend.unavailable(name)
        facts[name] = f"no: {reason}" if reason else "yes" + ("" if device == "cuda" else ", in Triton's interpreter")
    facts["compiler"] = build.compiler() or "none"
    facts["torch"] = torch.__version__
    try:
        facts["triton version"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton version"] = "not installed"
    facts["cache"] = str(cache_folder() / "kernels")
    facts["installed by"] = (
        "a merge, where a test finds them right and faster (kernels: true in a recipe: always), or "
        "danceopd.kernels.install(pipe.transformer)"
    )
    facts["head dims"] = ", ".join(map(str, backend.HEAD_DIMS))
    facts["attention backend"] = "measured once for each shape, on first use" if cuda else "SDPA, as always on a CPU"
    facts["FlashAttention-4"] = attention_backends.flash4_version() or "not installed (pip install 'danceopd[flash]')"
    for key, choice in sorted(attention.choices().items()) if cuda else ():
        facts[f"attention for {key}"] = f"{choice.backend} ({choice.reason})"
    return facts


def show(facts: dict[str, str]) -> None:
    """Print what `describe` found as a table."""
    from rich.table import Table

    from danceopd.common.console import wide_console

    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, value)
    wide_console().print(table, highlight=False)


def kernels(as_json: Json = False) -> None:
    """Say which fused kernels would run on this machine, and why.

    Example: danceopd kernels --json
    """
    (print_json if as_json else show)(describe())


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: print it.")] = None,
) -> None:
    """Write the JSON schema of a recipe, by which an editor completes and checks its keys.

    Example: danceopd schema -o recipe.schema.json
    """
    from danceopd.recipe.reference import schema as made

    if output is None:
        return print_json(made(installed=True))
    from danceopd.common.files import disk_errors, write_json

    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output / 'recipe.schema.json'}")
    with disk_errors(output):
        write_json(output, made(installed=True))
    echo(f"schema: {output}; the first line of a recipe beside it: # yaml-language-server: $schema={output.name}")


def version(as_json: Json = False) -> None:
    """Versions of danceopd and of what its results depend on.

    Example: danceopd version --json
    """
    from importlib import metadata

    from danceopd import __version__

    found = {"danceopd": __version__}
    for name in ("torch", "diffusers", "transformers", "peft", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "(not installed)"
    if as_json:
        return print_json(found)
    for name, which in found.items():
        echo(f"{name} {which}")


def show_version(wanted: bool) -> None:
    if wanted:
        from danceopd import __version__

        echo(f"danceopd {__version__}")
        raise typer.Exit


def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge what several image models can do into one adapter, and prove that nothing got worse."""
    hush(quiet)
    raise_voice(verbose, last=False)
