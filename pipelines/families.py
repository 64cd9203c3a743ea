"""The registry of model families, and which one a pipeline belongs to."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from danceopd.errors import UserError

from .family import Family
from .flux2 import FLUX2_KLEIN

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX2_KLEIN,)}


def family_of(pipe_or_folder: Any) -> Family:
    """The family of a loaded pipeline, of a pipeline folder, or of a model on the hub.

    Read from the class name, or from `model_index.json`; no weights are loaded. UserError when there is no
    such file or when no family knows the class.
    """
    if isinstance(pipe_or_folder, str | Path):
        name, where = _class_name(pipe_or_folder), str(pipe_or_folder)
    else:
        name = where = type(pipe_or_folder).__name__
    for family in FAMILIES.values():
        if name in (family.generation, family.editing):
            return family
    known = sorted({c for family in FAMILIES.values() for c in (family.generation, family.editing) if c})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean a {near[0]}" if near else f"use one of {', '.join(known)}"
    raise UserError(f"{where} is a {name}, which danceopd does not know; {hint}")


def _class_name(folder: str | Path) -> str:
    index = Path(folder) / "model_index.json"
    try:
        if index.parent.exists():
            return json.loads(index.read_text())["_class_name"]
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.load_config(str(folder))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a diffusers pipeline ({type(error).__name__} at model_index.json); "
            f"give a folder that DiffusionPipeline.save_pretrained wrote, or a model's name on the hub"
        ) from error
