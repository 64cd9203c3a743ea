"""What `data: auto` stands for: the prompt bank that ships, or the built-in scenes where those alone make sense.

The shipped base knows nothing but the scenes. Unasked, a base that draws pictures as small as theirs has them, too,
such as one that `danceopd teach` made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.common.parse import read_json
from danceopd.common.shipped import SHIPPED, portable

if TYPE_CHECKING:
    from danceopd.recipe.recipe import Recipe

SMALL = 64
"""Pixels of a side of the scenes."""


def settled_data(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe whose `auto` is the scenes, with that written."""
    shipped = portable(recipe.base) in SHIPPED
    asked = recipe.data.model_fields_set
    keys = [key for key in ("generation", "editing") if getattr(recipe.data, key) == "auto"]
    scenes = [key for key in keys if shipped or (key not in asked and _is_small(recipe))]
    teachers = tuple(
        one.model_copy(update={"data": "scenes"}) if shipped and one.data == "auto" else one for one in recipe.teachers
    )
    return {"data": recipe.data.model_copy(update=dict.fromkeys(scenes, "scenes")), "teachers": teachers}


def _is_small(recipe: Recipe) -> bool:
    settings = Path(recipe.base) / "danceopd.json"
    own = read_json(settings, "the base's settings") if settings.is_file() else {}
    height = recipe.call.get("height", own.get("height"))
    return isinstance(height, int) and height <= SMALL
