"""A reward of the user's: a function named "module:function" in the recipe."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danceopd.errors import UserError
from danceopd.labelfree.rewards.group import Group, Reward


def own(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A reward: `function(groups, **options)` of "module:function", imported from the working folder or as installed.

    UserError where it cannot be found, and where it returns no tensor (Q, G) of numbers or NaN.
    """
    function, keys = find(name), dict(options or {})

    def rewards(groups: Sequence[Group]) -> Tensor:
        found = function(groups, **keys)
        shape = (len(groups), len(groups[0].clean))
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or bool(found.isinf().any()):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            what = "an infinite number" if what == f"shape {shape}" else what
            raise UserError(
                f"reward {name} returned {what}; let it return a tensor of shape {shape}, a finite number (or NaN, for "
                "nothing to say) for each sample of each group"
            )
        return found.to(groups[0].clean.device, torch.float32)

    return rewards


def find(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; UserError where there is none."""
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises while it loads
        raise UserError(
            f"reward {name}: module {module!r} does not import ({type(error).__name__}: {error}); it must lie in "
            f"{here} or be installed"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"reward {name}: module {module!r} has no function {function!r}")
    return found
