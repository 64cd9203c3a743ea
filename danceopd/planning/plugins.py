"""The plug-ins that a recipe names, loaded and tried as far as that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from danceopd.adapters.blending.methods import method_of
from danceopd.engine.callbacks import check_callback
from danceopd.engine.objectives import objective_of
from danceopd.engine.query import levels_at
from danceopd.errors import UserError
from danceopd.labelfree.rewards.own import find
from danceopd.pipelines.registry import family_of
from danceopd.plugins import check_options, load, origin
from danceopd.recipe.checks import plugged
from danceopd.recipe.recipe import Recipe

Options = Mapping[str, Any]
NOT_PLANNED = {
    "objective": "; planned as danceopd", "teacher field": "; what it takes itself is not planned",
    "callback": "; what it takes itself is not planned",
}  # fmt: skip
"""What a plan does not know of a plug-in, by its kind."""


def _law(name: str, options: Options) -> None:
    levels = levels_at(torch.linspace(0, 1, 101, dtype=torch.float64), name, options)
    if bool((levels.diff() < 0).any()):
        raise UserError(f"query law {name} falls where its shares rise; let its noise levels rise with them")


CHECKS: dict[str, Callable[[str, Options], object]] = {
    "family": lambda name, options: family_of("", name),
    "objective": objective_of,
    "query law": _law,
    "blend method": lambda name, options: method_of(name),
    "teacher field": lambda name, options: check_options("teacher field", name, load("teacher field", name), options),
    "reward": find,
    "callback": check_callback,
}


def check_plugins(recipe: Recipe) -> list[str]:
    """A line for each plug-in of a recipe: what it is and where it is from. UserError for one that cannot be used."""
    found = []
    for kind, name, options in plugged(recipe):
        CHECKS[kind](name, options)
        found.append(f"{kind} {name}: {origin(kind, name)}{NOT_PLANNED.get(kind, '')}")
    return found
