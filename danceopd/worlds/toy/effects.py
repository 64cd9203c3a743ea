"""Sixteen small effects, each one operation, one ground or one style; `danceopd teach NAME` trains one in minutes.

They are what a merge of many teachers is shown on (benchmarks/many.py), and are not shipped. An effect's `task` is what
its teacher is trained and scored on, and, as the data source `scenes:TASK`, what a merge asks it.
"""

from __future__ import annotations

from dataclasses import dataclass

from danceopd.worlds.scenes.grammar import BACKGROUNDS, STYLES

RANK = 16
"""Rank of an effect's LoRA: 0.5 MB in bfloat16."""


@dataclass(frozen=True)
class Effect:
    """An effect: the capability that it belongs to, and its task in the scenes."""

    capability: str
    task: str

    @property
    def data(self) -> str:
        """The data source of a recipe."""
        return f"scenes:{self.task}"


EFFECTS: dict[str, Effect] = {
    "effect-counting": Effect("generation", "counting"),
    "effect-remove": Effect("editing", "subject-remove"),
    "effect-outline": Effect("editing", "style_change=outline"),
    "effect-position": Effect("generation", "position"),
    "effect-recolour": Effect("editing", "color_alter"),
    "effect-sky": Effect("editing", "background_change=sky"),
    "effect-binding": Effect("generation", "color_attr"),
    "effect-night": Effect("editing", "style_change=night"),
    "effect-add": Effect("editing", "subject-add"),
    "effect-replace": Effect("editing", "subject-replace"),
    **{
        f"effect-{value}": Effect("editing", f"{task}={value}")
        for task, values in (("background_change", BACKGROUNDS), ("style_change", STYLES))
        for value in values
        if value not in ("outline", "sky", "night")
    },
}
"""By name; the first two, four, eight of them are of both capabilities, too."""
