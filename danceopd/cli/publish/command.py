"""The command `push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danceopd.cli.boundary import echo
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.run.publish.files import Publication


def push(
    run: Annotated[Path, typer.Argument(help="The run folder of a finished merge.")],
    repo: Annotated[str, typer.Argument(help="The model's name on the Hugging Face Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch that exists there; default: main.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's name on the hub, where the merge had a folder.")
    ] = None,
    comfyui: Annotated[bool, typer.Option("--comfyui", help="Add a file with ComfyUI's names.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="The repository may hold another model now.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and end.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Publish a student on the Hugging Face Hub: weights, model card, sample grid, recipe, report.

    Example: danceopd push student you/my-student --private --dry-run
    """
    from danceopd.run.publish.push import push as send

    def confirm(found: Publication) -> bool:
        _show(found, repo, private)
        if dry_run or yes:
            return True
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise UserError("nobody is there to say yes; add --yes, or --dry-run to look only")
        return typer.confirm("Send this?", default=False)

    address = send(
        run, repo, private=private, revision=revision, base_model=base_model, comfyui=comfyui, replace=replace,
        dry_run=dry_run, message=message, confirm=confirm,
    )  # fmt: skip
    echo("nothing was sent" if address is None else f"pushed: {address}")


def _show(found: Publication, repo: str, private: bool) -> None:
    from danceopd.common.system import gigabytes

    for name, size in found.files.items():
        echo(f"{gigabytes(size):>9}  {name}")
    total = gigabytes(sum(found.files.values()))
    kind = "a private repository, if it is new" if private else "a public repository, if it is new"
    echo(f"{total:>9}  in {len(found.files)} files, to {repo} ({kind}); base {found.base or 'inside'}")
    for note in found.notes:
        echo(f"note: {note}")
