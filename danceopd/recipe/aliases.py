"""Recipe keys of earlier versions: renamed ones are read under their new name, removed ones are refused or dropped.

`modernise` is called on a recipe's plain data before it is validated. A renamed key works for one version and is
named in one line of warning. A removed key at its old default is dropped, so that the run folders of earlier versions
can be continued, with a warning where the default did something; any other value is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from danceopd.errors import UserError

RENAMED = {
    "gap": "validation",
    "watch": "monitor",
    "call.steps": "call.num_inference_steps",
    "rollout.keep_source": "rollout.cache_source",
    "rollout.captured": "rollout.cuda_graphs",
}
REMOVED: dict[str, tuple[Any, str]] = {
    "rollout.persistent": (1, "rollouts over several updates measured no gain"),
    "routing.answer": ("routed", "in its paper the mean of all teachers is well behind the routed teacher"),
    "gates.experiment": (False, "it only served consensus.target live-self"),
    "gates.consensus.target": ("teacher", "a student that is its own teacher confirms its mistakes"),
    "gates.consensus.by": ("words", "asking a teacher at other strengths was never shown to help"),
    "gates.consensus.jitter": (0.15, "it belonged to consensus.by strength"),
    "gates.consensus.outputs": ("estimate", "it belonged to ranked pictures, which were never shown to help"),
    "gates.consensus.rank": (0.5, "ranked pictures were never shown to help"),
    "gates.consensus.edited": (0.3, "it belonged to ranked pictures, which were never shown to help"),
    "gates.consensus.kept": (0.5, "it belonged to ranked pictures, which were never shown to help"),
}
"""Key -> the default it had, and why it is gone."""
_UNRANKED = (
    "gates.consensus no longer ranks the pictures of a group, as it did by default where gates.group is above 1: "
    "that was never shown to help"
)


def modernise(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's plain data with today's keys, and a sentence for each thing that the reader should be warned of.

    ValueError where an old and a new name are both given, or a removed key has a value that would change the run.
    """
    found = _copy(data)
    if (ranked := _ranked(found)) == "asked":
        raise ValueError("gates.consensus.rank was removed and needs gates.group 1; leave out gates.group")
    warnings = [_UNRANKED] if ranked else []
    for key, (default, why) in REMOVED.items():
        parent, name = _parent(found, key)
        if parent is not None and name in parent:
            if parent[name] != default:
                raise ValueError(f"{key} was removed: {why}; leave it out")
            del parent[name]
    for key, new in RENAMED.items():
        parent, name = _parent(found, key)
        if parent is None or name not in parent:
            continue
        if (target := new.rpartition(".")[2]) in parent:
            raise ValueError(f"{key} is the old name of {new}, and both are given; keep {new}")
        parent[target] = parent.pop(name)
        warnings.append(f"recipe key {key} is now called {new}; the old name works for one version")
    return found, warnings


def with_settings(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with other values, by dotted key; UserError where a key goes into what is no mapping."""
    found = _copy(data)
    for key, value in settings.items():
        *path, name = key.split(".")
        here = found
        for part in path:
            below = here.get(part)
            if below is None or isinstance(below, bool):
                below = here[part] = {}
            if not isinstance(below, dict):
                raise UserError(f"--set {key}: {part} is no mapping of keys to values; edit the recipe's file")
            here = below
        here[name] = value
    return found


def _ranked(data: Mapping[str, Any]) -> Literal["asked", "by default"] | None:
    """Whether an earlier version would have ranked pictures: it did by default where rows came in groups."""
    gates = data.get("gates")
    if not isinstance(gates, Mapping) or gates.get("group", 1) == 1:
        return None
    consensus = gates.get("consensus")
    if isinstance(consensus, Mapping) and "rank" in consensus:
        return "asked"
    return "by default" if consensus else None


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _parent(data: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that a dotted key stands in (None: there is none), and its last word."""
    *path, name = key.split(".")
    here: Any = data
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return (here if isinstance(here, dict) else None), name
