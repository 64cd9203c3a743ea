"""How varied pictures are where the prompt leaves it open: what correctness alone cannot see.

Colour, place and background that a prompt does not state should be as uniform as in the training data. Each is
compared with that law by total variation (0 equal, 1 disjoint). A finite sample of the law itself is not at 0,
so its expected value stands beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from danceopd.scenes.grammar import BACKGROUNDS, CELL, COLOURS, GRID, Scene, allowed_colours
from danceopd.scenes.prompts import Prompt

FREE_COLOURS = ("single_object", "two_object", "counting", "position")
"""Categories that state no colour."""
FREE_PLACES = ("single_object", "two_object", "counting", "colors", "color_attr")
"""Categories that state no place."""
DRAWS = 400


def total_variation(seen: np.ndarray, law: np.ndarray) -> dict[str, float | int]:
    """``{distance, chance, n}`` of counts (k,) against probabilities (k,); chance is what ``n`` draws of it get."""
    number = int(seen.sum())
    drawn = np.random.default_rng(0).multinomial(number, law, DRAWS) / number
    chance = float(np.abs(drawn - law).sum(1).mean() / 2)
    distance = float(np.abs(seen / number - law).sum() / 2)
    return {"distance": round(distance, 4), "chance": round(chance, 4), "n": number}


def _colours(drawn: Sequence[tuple[Prompt, Scene]]) -> tuple[Counter, np.ndarray]:
    """Colours of things where none is stated, and their law: uniform over those that training shows."""
    seen: Counter[int] = Counter()
    law = np.zeros(len(COLOURS))
    for prompt, scene in drawn:
        for thing in scene.things if prompt.tag in FREE_COLOURS else ():
            seen[COLOURS.index(thing.colour)] += 1
            allowed = allowed_colours(thing.shape, False)
            law[[COLOURS.index(colour) for colour in allowed]] += 1 / len(allowed)
    return seen, law


def diversity(drawn: Sequence[tuple[Prompt, Scene]]) -> dict[str, dict[str, float | int]]:
    """``colour``, ``place`` (the 16 cells) and ``background`` of (prompt, scene read) pairs, where not stated.

    Prompts are those of the test split, which name no background.
    """
    colours, law = _colours(drawn)
    places: Counter[int] = Counter()
    for prompt, scene in drawn:
        for thing in scene.things if prompt.tag in FREE_PLACES else ():
            places[int(thing.y // CELL) * GRID + int(thing.x // CELL)] += 1
    grounds = Counter(BACKGROUNDS.index(scene.background) for _, scene in drawn)
    even = {size: np.full(size, 1 / size) for size in (GRID * GRID, len(BACKGROUNDS))}
    factors = {"colour": (colours, law), "place": (places, even[GRID * GRID])}
    factors["background"] = (grounds, even[len(BACKGROUNDS)])
    return {
        name: total_variation(np.array([seen[i] for i in range(len(law))], float), law / law.sum())
        for name, (seen, law) in factors.items()
        if seen
    }
