"""The checkpoints that ship with the package, and how a name in a recipe or a command becomes a path.

A shipped name such as "base" means that checkpoint, wherever the package is installed; anything else is a path,
relative to the current folder. A base model may also be `owner/name` on the hub. Paths are made absolute at once, so
that a run can be continued from another folder.
"""

from __future__ import annotations

import os
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from danceopd.common.messages import did_you_mean
from danceopd.common.parse import local_path
from danceopd.errors import UserError

SHIPPED = ("base", "generation", "editing", "local-edit", "global-edit")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _root() -> Path:
    with as_file(files("danceopd.checkpoints")) as folder:
        return Path(folder)


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint: "base", "generation", "editing", "local-edit" or "global-edit"."""
    if name not in SHIPPED:
        raise UserError(f"no shipped checkpoint is named {name!r}{did_you_mean(name, SHIPPED)}")
    folder = _root() / name
    if not folder.is_dir():
        raise UserError(
            f"the shipped checkpoint {name!r} is missing at {folder}; make it with `danceopd teach {name}`, "
            "or install the package again"
        )
    return folder


def demo() -> Path:
    """The recipe that `danceopd merge` runs when it is given none."""
    return _root() / "demo.yaml"


def portable(path: str) -> str:
    """The shipped name of a shipped checkpoint's path, which holds on every machine; other paths unchanged."""
    try:
        name = str(Path(path).relative_to(_root()))
    except ValueError:
        return path
    return name if name in SHIPPED else path


def resolve(value: Any, what: str, *, hub: bool = False, hint: str = "", shipped_names: bool = True) -> Any:
    """The path of a shipped name, an existing path made absolute, or with `hub` an `owner/name`; else a UserError.

    `what` is how the message names the value, `hint` the end of that message.
    """
    if not isinstance(value, (str, Path)):
        return value  # pydantic reports the wrong type
    text = str(value)
    if not text.strip():
        raise UserError(f"the {what} is empty; give a path or one of {', '.join(SHIPPED)}")
    if shipped_names and text in SHIPPED:
        return str(shipped(text))
    path = local_path(text, what)
    if path.exists():
        return str(path.absolute())
    if hub and _HUB.fullmatch(text):
        return text
    if not hint:
        is_name = shipped_names and path.name == text
        hint = did_you_mean(text, SHIPPED) if is_name else "; give an existing folder or file"
    if path.is_symlink():
        hint = f": it is a link to {os.readlink(path)}{hint}"
    raise UserError(f"{what} {text!r} does not exist (looked at {path.absolute()}){hint}")
