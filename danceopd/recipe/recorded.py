"""The recipe in a run's folder, wherever that folder is now: a project that was moved as a whole is still one.

`recipe.yaml` names absolute paths. One that is gone is looked for where it was in relation to the run's folder, whose
own former place is `output` in that file. Whether what lies there is what the run was trained on, hashes say.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from danceopd.common.messages import read_yaml
from danceopd.errors import UserError


def recorded_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in `folder/recipe.yaml` as plain data, with paths that moved together with the folder as they are
    now."""
    fields, now = read_yaml(folder / "recipe.yaml", "recipe"), folder.absolute()
    if not fields:
        raise UserError(f"{folder / 'recipe.yaml'} is empty, so nobody knows what this run is; restore it")
    was = fields.get("output")
    if not isinstance(was, str) or not os.path.isabs(was) or Path(was) == now:
        return fields
    return {**_moved(fields, was, now), "output": str(now)}


def _moved(value: Any, was: str, now: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, was, now) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, was, now) for item in value]
    with suppress(OSError, ValueError):  # names that no file can have
        if isinstance(value, str) and os.path.isabs(value) and not os.path.exists(value):
            place = Path(os.path.normpath(now / os.path.relpath(value, was)))
            return str(place) if place.exists() else value
    return value
