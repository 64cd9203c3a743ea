"""Merge what several image models can do into one adapter, and prove that nothing got worse.

    student = danceopd.merge(danceopd.Recipe.from_yaml("recipe.yaml"))
    pipe = danceopd.load_student("student")        # the stock diffusers pipeline, adapter loaded

The names below are imported on first use, so `import danceopd` and `danceopd --help` never wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danceopd.adapters.load import load_student
    from danceopd.errors import UserError
    from danceopd.merge import merge
    from danceopd.recipe.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "load_student", "merge"]

_HOME = {"Recipe": "recipe", "UserError": "errors", "load_student": "adapters.load", "merge": "merge"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the room `danceopd.merge` may not replace the function `danceopd.merge`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
