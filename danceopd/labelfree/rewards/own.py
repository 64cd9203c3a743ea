"""A reward of the user's, a plug-in: a function named "module:function" in the recipe, or an entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danceopd.errors import UserError
from danceopd.labelfree.rewards.group import Group, Reward
from danceopd.plugins import check_options, load


def own(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A reward: `function(groups, **options)` of a name.

    UserError where it cannot be found, and where it returns no tensor (Q, G) of numbers or NaN.
    """
    function, keys = find(name, options), dict(options or {})

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


def find(name: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function of a name; UserError where there is none, or it does not take the options."""
    function = load("reward", name)
    check_options("reward", name, function, options or {})
    return function
