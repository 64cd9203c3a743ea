"""A suite: pictures of one colour, whose right answer is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from danceopd.bench.suites.protocol import ExactSuite, Item, Score, json_sha256

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Colours(ExactSuite):
    """Four prompts; 1 where the picture's mean colour is nearest to the one that was asked for."""

    name = "colours"
    version = "1"
    scale = {"generation": (0.0, 1.0)}
    share = {"generation": True}
    rules = {"score": "1 where the mean colour is nearest to the prompt's, else 0"}
    protocol = json_sha256(name, version, rules, COLOURS)

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return [Item(c, "generation", "generation", "colours", f"a {c} background", task=c) for c in COLOURS][:limit]

    def editing_items(self, limit: int | None = None) -> list[Item]:
        return []

    def _scores(self, items: Sequence[Item], images: Sequence[Any]) -> list[Score]:
        found = []
        for item, image in zip(items, images, strict=True):
            mean = np.asarray(image, float).reshape(-1, 3).mean(0)
            nearest = min(COLOURS, key=lambda colour: float(np.abs(mean - COLOURS[colour]).sum()))
            right = nearest == item.task
            found.append(Score(float(right), right, "" if right else f"it is {nearest}"))
        return found
