"""The checkpoints that ship with the package, and how a name in a recipe becomes a path.

A bare shipped name means the shipped checkpoint, wherever the package is installed; anything else is a path,
taken from the current folder. A base model may also be `owner/name` on the hub.
Paths become absolute at once, so that a run can be continued from another folder.
"""

from __future__ import annotations

import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from .errors import UserError
from .sentences import nearest

SHIPPED = ("base", "generation", "editing", "local-edit", "global-edit")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _root() -> Path:
    with as_file(files("danceopd.checkpoints")) as folder:
        return Path(folder)


def shipped(name: str) -> Path:
    """The folder of a shipped checkpoint: "base", "generation", "editing", "local-edit" or "global-edit"."""
    if name not in SHIPPED:
        raise UserError(f"no shipped checkpoint is named {name!r}{nearest(name, SHIPPED)}")
    folder = _root() / name
    if not folder.is_dir():
        raise UserError(
            f"the shipped checkpoint {name!r} is missing at {folder}; make it with `danceopd teach {name}`, "
            "or install the package again"
        )
    return folder


def demo() -> Path:
    """The recipe of `danceopd merge` with nothing given."""
    return _root() / "demo.yaml"


def portable(path: str) -> str:
    """The shipped name of a path below the shipped checkpoints; any other path as it is."""
    try:
        name = str(Path(path).relative_to(_root()))
    except ValueError:
        return path
    return name if name in SHIPPED else path


def resolve(value: Any, what: str, *, hub: bool = False, hint: str = "", shipped_names: bool = True) -> Any:
    """A shipped name, an existing path (made absolute), or with `hub` an `owner/name`; else a UserError."""
    if not isinstance(value, (str, Path)):
        return value  # pydantic says what kind it should be
    text = str(value)
    if not text.strip():
        raise UserError(f"the {what} is empty; give a path or one of {', '.join(SHIPPED)}")
    path = Path(text).expanduser()
    if shipped_names and text in SHIPPED:
        return str(shipped(text))
    if path.exists():
        return str(path.absolute())
    if hub and _HUB.fullmatch(text):
        return text
    if not hint:
        hint = nearest(text, SHIPPED) if shipped_names and path.name == text else "; give an existing folder or file"
    raise UserError(f"{what} {text!r} does not exist (looked at {path.absolute()}){hint}")
