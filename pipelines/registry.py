"""The registry of model families, which family a pipeline belongs to, and a condition with another prompt.

A family of your own is a plug-in (docs/plugins.md). It joins `FAMILIES` under its own name when it is first found.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from danceopd.common.parse import parse_json
from danceopd.errors import UserError
from danceopd.plugins import load, name_of, plugin_names

from .condition import Condition
from .families.anima import ANIMA
from .families.fibo import BRIA_FIBO
from .families.flux1 import FLUX1
from .families.flux2 import FLUX2_DEV, FLUX2_KLEIN, FLUX2_KLEIN_KV
from .families.hidream import HIDREAM
from .families.krea2 import KREA2
from .families.longcat import LONGCAT_IMAGE
from .families.qwen import QWEN_IMAGE
from .families.qwen21 import QWEN_IMAGE_21
from .families.sd3 import SD3
from .families.wan import WAN
from .families.zimage import Z_IMAGE
from .family import Family

_FAMILIES = (
    FLUX2_KLEIN, FLUX2_KLEIN_KV, FLUX2_DEV, FLUX1, QWEN_IMAGE, QWEN_IMAGE_21, Z_IMAGE, KREA2, SD3, LONGCAT_IMAGE,
    BRIA_FIBO, HIDREAM, WAN, ANIMA,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
BUILTIN = dict(FAMILIES)
"""Those that are no plug-ins."""


def family_of(pipe_or_folder: Any, name: str | Family | None = None) -> Family:
    """The family of a loaded pipeline, of a pipeline folder, or of a model on the hub.

    Read from the class name or from `model_index.json`; no weights are loaded. A `name` decides alone: a key of
    `FAMILIES`, or a plug-in. UserError when there is no such file, or no family of that name or class.
    """
    if name is not None:
        return _named(name)
    if isinstance(pipe_or_folder, str | Path):
        known_as, where = class_name(pipe_or_folder), str(pipe_or_folder)
    else:
        known_as = where = type(pipe_or_folder).__name__
    for family in FAMILIES.values():
        if known_as in family.classes:
            return family
    own = [family for family in map(_named, plugin_names("family")) if known_as in family.classes]
    if len(own) > 1:
        raise UserError(f"{where} is a {known_as}, a class of families {own[0].name} and {own[1].name}; set `family`")
    if own:
        return own[0]
    known = {name: family.name for family in FAMILIES.values() for name in family.classes}
    near = max(known, key=lambda one: difflib.SequenceMatcher(None, known_as, one).ratio())
    raise UserError(
        f"{where} is a {known_as}, which danceopd does not know; the nearest family is {known[near]} ({near}): see "
        "docs/bring-your-own-model.md for family: in a recipe, and for how to add a family"
    )


def _named(name: str | Family) -> Family:
    """The family of a name; a plug-in is listed in `FAMILIES`."""
    name = name_of("family", name)
    family: Family = load("family", name, BUILTIN, lambda value: isinstance(value, Family))
    if BUILTIN.get(family.name) is family:
        return family
    import diffusers

    if family.name in BUILTIN:
        raise UserError(f"family {name} calls itself {family.name!r}, which is built in; give its Family another name")
    if missing := [one for one in family.classes if not hasattr(diffusers, one)]:
        raise UserError(
            f"family {name} is for {missing[0]}, which diffusers {diffusers.__version__} does not have; name one "
            "of its pipeline classes"
        )
    FAMILIES[family.name] = family
    return family


def class_name(folder: str | Path) -> str:
    """The pipeline class in the `model_index.json` of a folder or of a model on the hub; UserError without one."""
    index = Path(folder) / "model_index.json"
    try:
        if index.parent.exists():
            name = parse_json(index.read_bytes())["_class_name"]
        else:
            from diffusers import DiffusionPipeline

            name = DiffusionPipeline.load_config(str(folder))["_class_name"]
        if isinstance(name, str):
            return name
        raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a diffusers pipeline ({type(error).__name__} at model_index.json); "
            f"give a folder that DiffusionPipeline.save_pretrained wrote, or a model's name on the hub"
        ) from error


def with_prompt_of(condition: Condition, other: Condition) -> Condition:
    """`condition` with the prompts of `other` (one row, or as many); source image and positions stay its own.

    With the condition of the null prompt as `other` this is the unconditional side of classifier-free guidance.
    """
    if len(other) not in (1, len(condition)):
        raise ValueError(f"the condition with the prompts has {len(other)} rows; give 1 or {len(condition)}")
    other = FAMILIES[condition.family].fit_prompt(other, condition)
    kwargs = dict(condition.kwargs)
    for key in FAMILIES[condition.family].prompt_kwargs:
        value = other.kwargs[key]
        kwargs[key] = None if value is None else value.expand(len(condition), *value.shape[1:]).clone()
    return replace(condition, kwargs=kwargs)
