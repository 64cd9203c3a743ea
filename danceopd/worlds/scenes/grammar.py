"""What a scene is: its vocabulary, placement and spatial relations, and the train, validation and test splits.

A scene is one to five coloured shapes on a background, drawn in a style. Two tiers share everything but the
placement: ``cells`` (a 4x4 grid, one object a cell) and ``free`` (any place, two sizes, at least 4 px apart).
Relations follow GenEval's rule. The split of a scene is a hash of the scene itself, so train, validation and
test cannot share one. A fixed set of (shape, colour) bindings and (operation, shape) pairs is held out of all
training images, so that composition can be told from memorisation.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError

IMAGE = 64
"""Side of an image in pixels."""
CELL = 16
"""Side of a cell of the ``cells`` tier in pixels; one FLUX.2 token covers as much."""
GRID = IMAGE // CELL

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("gray", "sky", "grass", "sand", "checker")
STYLES = ("flat", "outline", "negative", "night")
RELATIONS = ("left of", "right of", "above", "below")
TIERS = ("cells", "free")
SIZES = {"cells": (6.0,), "free": (8.0, 11.0)}
"""Radii in pixels."""
SPLITS = {"train": range(0, 80), "val": range(80, 90), "test": range(90, 100)}

HELDOUT_OPERATIONS = frozenset({("subject-replace", "star"), ("subject-add", "diamond")})
"""(edit task, new shape) pairs that are in no training edit; training prompts do show the shapes."""


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@dataclass(frozen=True, order=True)
class Thing:
    """One object: its shape and colour, its centre (x, y) and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """Everything that an image of this world shows."""

    things: tuple[Thing, ...]
    background: str
    style: str

    def key(self) -> str:
        """A canonical line of text: equal for equal pictures, in whatever order the things are."""
        things = ";".join(
            f"{t.shape},{t.colour},{t.x:g},{t.y:g},{t.size:g}" for t in sorted(self.things)
        )
        return f"{things}|{self.background}|{self.style}"

    def split(self) -> str:
        """``train``, ``val`` or ``test``, from the sha256 of the key."""
        return split_of(self.key())

    def with_thing(self, index: int, thing: Thing | None) -> Scene:
        """The scene with one thing replaced, or removed when ``thing`` is None."""
        things = [t for i, t in enumerate(self.things) if i != index]
        if thing is not None:
            things.insert(index, thing)
        return replace(self, things=tuple(things))


@lru_cache(maxsize=1 << 16)
def split_of(key: str) -> str:
    """The split that a scene key falls into (80 / 10 / 10 per cent)."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def check_split(split: str) -> None:
    """UserError for an unknown split, in which no scene would ever be found."""
    if split not in SPLITS:
        raise UserError(f"no split is named {split!r}{did_you_mean(split, SPLITS)}")


def is_heldout_binding(shape: str, colour: str) -> bool:
    """Whether (shape, colour) is held out of training data, one colour for each shape: (3 i + j) mod 8 = 0."""
    return (3 * SHAPES.index(shape) + COLOURS.index(colour)) % len(COLOURS) == 0


def has_heldout_binding(scene: Scene) -> bool:
    """Whether any thing of the scene is a held-out (shape, colour) pair."""
    return any(is_heldout_binding(t.shape, t.colour) for t in scene.things)


def relations(a: Thing, b: Thing) -> frozenset[str]:
    """The relations of ``a`` to ``b`` by GenEval's rule.

    The offset of the centres is shrunk on each axis by a tenth of both widths; a relation holds when its
    component of the remaining direction exceeds 0.5.
    """
    slack = 0.1 * 2 * (a.size + b.size)
    dx, dy = a.x - b.x, a.y - b.y
    dx = max(abs(dx) - slack, 0.0) * (1 if dx > 0 else -1)
    dy = max(abs(dy) - slack, 0.0) * (1 if dy > 0 else -1)
    length = (dx * dx + dy * dy) ** 0.5
    if length == 0:
        return frozenset()
    dx, dy = dx / length, dy / length
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in held.items() if holds)


def corner_of(thing: Thing) -> str | None:
    """The quarter of the image that holds the thing's centre: ``top left`` and so on."""
    vertical = "top" if thing.y < IMAGE / 2 else "bottom"
    horizontal = "left" if thing.x < IMAGE / 2 else "right"
    return f"{vertical} {horizontal}"


CORNERS = ("top left", "top right", "bottom left", "bottom right")


def cell_centres() -> list[tuple[float, float]]:
    """The 16 centres (x, y) of the ``cells`` tier, in reading order."""
    return [(CELL * (c + 0.5), CELL * (r + 0.5)) for r in range(GRID) for c in range(GRID)]


def free_places(scene: Scene, size: float, tier: str) -> list[tuple[float, float]]:
    """Centres where a further thing of radius ``size`` fits, in reading order."""
    if tier == "cells":
        taken = {(t.x, t.y) for t in scene.things}
        return [place for place in cell_centres() if place not in taken]
    margin = size + 1
    grid = [margin + 2.0 * i for i in range(int((IMAGE - 2 * margin) // 2) + 1)]
    return [
        (x, y)
        for y in grid
        for x in grid
        if all(max(abs(x - t.x), abs(y - t.y)) >= size + t.size + 4 for t in scene.things)
    ]


def place(rng: random.Random, looks: list[tuple[str, str]], tier: str) -> tuple[Thing, ...] | None:
    """Things of the given (shape, colour) looks at random places, or None when they do not fit."""
    if tier == "cells":
        spots = rng.sample(cell_centres(), len(looks))
        return tuple(Thing(s, c, x, y, SIZES["cells"][0]) for (s, c), (x, y) in zip(looks, spots, strict=True))
    scene = Scene((), BACKGROUNDS[0], STYLES[0])
    for shape, colour in looks:
        size = rng.choice(SIZES["free"])
        spots = free_places(scene, size, tier)
        if not spots:
            return None
        x, y = rng.choice(spots)
        scene = replace(scene, things=(*scene.things, Thing(shape, colour, x, y, size)))
    return scene.things


def allowed_colours(shape: str, heldout: bool | None) -> list[str]:
    """The colours of a shape: those in training data (`heldout` False), the held-out one (True), or all (None)."""
    return [c for c in COLOURS if heldout is None or is_heldout_binding(shape, c) == heldout]
