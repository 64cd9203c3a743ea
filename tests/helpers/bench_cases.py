"""A cheap suite for the bench: brightness is its score; and how its images are asked for and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tiny import random_image

from danceopd.bench.suites.protocol import ExactSuite, Item, Score

CALL = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 48}


class Suite(ExactSuite):
    """Two categories of each capability, scored by the brightness of the image; cheap, and of no particular world."""

    name, version, protocol = "dots", "1", "00" * 32
    rules = {"scorer": "brightness"}
    scale = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
    share = {"generation": True, "editing": False}
    exact = ("editing",)

    def generation_items(self, limit: int | None = None) -> list[Item]:
        words = ["a red circle", "two blue square", "a green star", "three white ring"][:limit]
        return [
            Item(f"g{n}", "generation", "generation", ("one", "many")[n % 2], w, None, None, None, None)
            for n, w in enumerate(words)
        ]

    def editing_items(self, limit: int | None = None) -> list[Item]:
        words = ["remove the red circle", "make it blue", "add a star"][:limit]
        return [
            Item(f"e{n}", "editing", "local", ("cut", "paint")[n % 2], w, None, random_image(n), random_image(9), None)
            for n, w in enumerate(words)
        ]

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        return {
            "editing": [Item("p0", "editing", "compound", "cut", "make it red", "odd", random_image(7), None, None)]
        }

    def _scores(self, items, images) -> list[Score]:
        light = [float(np.asarray(image, float).mean()) / 255 for image in images]
        return [
            Score(float(v > 0.5) if i.capability == "generation" else 10 * v, v > 0.5, f"{v:.2f}")
            for i, v in zip(items, light)
        ]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)
