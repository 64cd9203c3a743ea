"""The type of a recipe's `trackers`: which experiment trackers a run has, and the options of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from danceopd.common.messages import did_you_mean, shown
from danceopd.recipe.values.names import options_by_name

TRACKERS = ("tensorboard", "wandb", "mlflow")
NONE = "none"


def _known(name: Any) -> str:
    if name not in TRACKERS:
        raise ValueError(f"no tracker is named {shown(name)}{did_you_mean(name, [*TRACKERS, NONE])}")
    return str(name)


def _trackers(value: Any) -> Any:
    """Options by name; `a, b` is a list, and `none` an empty one."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    return options_by_name([] if value == [NONE] else value, _known)


_OPTIONS = {"anyOf": [{"type": "object"}, {"type": "null"}]}
Trackers = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(_trackers),
    WithJsonSchema(
        {"anyOf": [{"type": "object", "properties": dict.fromkeys(TRACKERS, _OPTIONS), "additionalProperties": False},
                   {"type": "array", "items": {"enum": list(TRACKERS)}},
                   {"enum": [*TRACKERS, NONE]}]}
    ),
]  # fmt: skip
