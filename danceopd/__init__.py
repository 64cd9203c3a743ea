"""Merge what several image models can do into one adapter, and prove that nothing got worse.

    student = danceopd.merge("recipe.yaml")        # a Recipe, its file, or a mapping of its keys
    pipe = danceopd.load_student("student")        # the stock diffusers pipeline, adapter loaded
    result = danceopd.bench("student")             # result.scores, result.report, result.grid
    blended = danceopd.blend(["a", "b"], [0.7, 0.9], "blended")

The names below are imported on first use, so `import danceopd` and `danceopd --help` never wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danceopd.adapters.load import load_student
    from danceopd.api import blend
    from danceopd.bench.run import bench
    from danceopd.errors import UserError
    from danceopd.merge import merge
    from danceopd.recipe.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "bench", "blend", "load_student", "merge"]

_HOME = {
    "Recipe": "recipe", "UserError": "errors", "bench": "bench.run", "blend": "api", "load_student": "adapters.load",
    "merge": "merge",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the rooms `danceopd.merge` and `danceopd.bench` may not replace the functions of their names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
