"""`prompts`: text-to-image tasks in GenEval's six categories and record format, each with a scene that satisfies it.

A record is ``{tag, include, exclude, prompt}``. Its scene is the training target of a teacher. What the prompt does not
state is drawn uniformly (but the style stays ``flat``). In the training split half of the prompts also name a
background or a style. ``counting-five`` is only for evaluation: training never shows five things.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from danceopd.worlds.scenes.grammar import (
    BACKGROUNDS,
    RELATIONS,
    SHAPES,
    STYLES,
    Scene,
    a,
    allowed_colours,
    check_split,
    place,
    relations,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PROBE_TAGS = ("counting-five",)
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class Prompt:
    """A GenEval record, the scene that was drawn for it, and whether it needs a held-out binding."""

    tag: str
    prompt: str
    include: list[dict] = field(hash=False)
    exclude: list[dict] = field(hash=False)
    scene: Scene
    heldout: bool = False

    def record(self) -> dict:
        """The GenEval record: tag, include, exclude, prompt."""
        return {"tag": self.tag, "include": self.include, "exclude": self.exclude, "prompt": self.prompt}


def _looks(rng: random.Random, tag: str, heldout: bool) -> tuple[list[tuple[str, str]], dict]:
    """Random (shape, colour) looks for a category, and what the prompt states of them."""

    def colour(shape: str, want: bool = False) -> str:
        return rng.choice(allowed_colours(shape, want))

    if tag in ("single_object", "colors"):
        shape = rng.choice(SHAPES)
        look = (shape, colour(shape, heldout and tag == "colors"))
        return [look], {"shapes": [shape], "colours": [look[1]]}
    if tag in ("counting", "counting-five"):
        shape, number = rng.choice(SHAPES), 5 if tag == "counting-five" else rng.choice((2, 3, 4))
        return [(shape, colour(shape)) for _ in range(number)], {"shapes": [shape], "number": number}
    first, second = rng.sample(SHAPES, 2)
    looks = [(first, colour(first, heldout and tag == "color_attr")), (second, colour(second))]
    while tag == "color_attr" and looks[0][1] == looks[1][1]:
        looks[1] = (second, colour(second))
    return looks, {"shapes": [first, second], "colours": [looks[0][1], looks[1][1]]}


def _record(tag: str, stated: dict, relation: str) -> tuple[str, list[dict], list[dict]]:
    """The prompt of a category and its include and exclude lists."""
    shapes = stated["shapes"]
    if tag == "single_object":
        return f"a photo of {a(shapes[0])}", [{"class": shapes[0], "count": 1}], []
    if tag == "colors":
        colour = stated["colours"][0]
        return f"a photo of {a(colour)} {shapes[0]}", [{"class": shapes[0], "count": 1, "color": colour}], []
    if tag in ("counting", "counting-five"):
        number = stated["number"]
        include = [{"class": shapes[0], "count": number}]
        return f"a photo of {NUMBERS[number]} {plural(shapes[0])}", include, [
            {"class": shapes[0], "count": number + 1}
        ]
    if tag == "position":
        include = [
            {"class": shapes[1], "count": 1},
            {"class": shapes[0], "count": 1, "position": [relation, 0]},
        ]
        return f"a photo of {a(shapes[0])} {relation} {a(shapes[1])}", include, []
    if tag == "two_object":
        return f"a photo of {a(shapes[0])} and {a(shapes[1])}", [{"class": s, "count": 1} for s in shapes], []
    include = [
        {"class": s, "count": 1, "color": c} for s, c in zip(shapes, stated["colours"], strict=True)
    ]
    (s1, s2), (c1, c2) = shapes, stated["colours"]
    return f"a photo of {a(c1)} {s1} and {a(c2)} {s2}", include, []


def plural(shape: str) -> str:
    """``circles``, ``crosses``, …"""
    return shape + ("es" if shape.endswith("s") else "s")


def draw_prompt(
    rng: random.Random, tag: str, tier: str = "cells", heldout: bool = False, tail: float = 0.0
) -> Prompt:
    """One random record of category ``tag`` with a scene for it.

    ``tail`` is the chance that the prompt also names a background or a style.
    """
    while True:
        looks, stated = _looks(rng, tag, heldout)
        relation = rng.choice(RELATIONS)
        things = place(rng, looks, tier)
        if things is None or (tag == "position" and relation not in relations(things[0], things[1])):
            continue
        prompt, include, exclude = _record(tag, stated, relation)
        background, style = rng.choice(BACKGROUNDS), "flat"
        if rng.random() < tail:
            kind = rng.choice(("background", "style", "both"))
            if kind != "style":
                prompt += f" on {a(background)} background"
            if kind != "background":
                style = rng.choice(STYLES)
                prompt += f" in {style} style"
        return Prompt(tag, prompt, include, exclude, Scene(things, background, style), heldout)


def prompts(
    split: str,
    count: int,
    seed: int = 0,
    tags: tuple[str, ...] | None = None,
    tier: str = "cells",
    heldout: bool = False,
) -> list[Prompt]:
    """``count`` records of a split, the categories in turn; equal arguments give equal records.

    ``heldout`` asks for the binding that training never shows (``colors`` and ``color_attr`` only).
    """
    tags = tags or (("colors", "color_attr") if heldout else TAGS)
    check_split(split)
    rng = random.Random(f"prompts/{split}/{seed}/{tier}/{heldout}")
    found: list[Prompt] = []
    while len(found) < count:
        tag = tags[len(found) % len(tags)]
        candidate = draw_prompt(rng, tag, tier, heldout, tail=0.5 if split == "train" else 0.0)
        if candidate.scene.split() == split:
            found.append(candidate)
    return found
