"""`render`: a scene of drawings goes in, a picture comes out, exact at any size, 512 pixels in the benchmark suite.

A picture is a ground (one of six backgrounds) and on it each drawing with a white rim, as a sticker has, so that it
stands out of a ground of its own colour. Styles are layers (line work alone, colour layers alone) or maps of the
finished picture (blocks, inverted, gray). Units are those of `danceopd.worlds.scenes`: a picture is 64 units wide.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.kinds import LINES, rgb
from danceopd.worlds.scenes.grammar import IMAGE, Scene, Thing

SIDE = 512
"""Pixels a side of the suite's pictures."""
BLOCKS = 64
"""Blocks a side of `pixel art`."""
RIM = 0.5
"""Width of the white rim, in units of 64 a picture."""
_INK = {"line drawing": ("#ffffff", "#000000"), "blueprint": ("#1e50a0", "#ffffff")}
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def _colour(fill: str) -> np.ndarray:
    return np.array(rgb(fill), np.float32) / 255


def _bands(side: int, stops: list[tuple[float, str]]) -> np.ndarray:
    """Horizontal bands: colours at heights from 0 to 1, linear between; equal heights make an edge."""
    at = (np.arange(side) + 0.5) / side
    heights = [height for height, _ in stops]
    colours = np.stack([_colour(fill) for _, fill in stops])
    rows = np.stack([np.interp(at, heights, channel) for channel in colours.T], -1).astype(np.float32)
    return np.repeat(rows[:, None], side, 1)


@lru_cache(maxsize=64)
def ground(background: str, style: str, side: int) -> np.ndarray:
    """An empty picture (side, side, 3) float32 in [0, 1]; not to be written to."""
    if style in LINES:
        return np.broadcast_to(_colour(_INK[style][0]), (side, side, 3))
    if background == "sky":
        picture = _bands(side, [(0, "#92d3f5"), (1, "#d3edfb")])
    elif background == "meadow":
        picture = _bands(side, [(0, "#92d3f5"), (0.5625, "#d3edfb"), (0.5625, "#b1cc33"), (1, "#8fb52e")])
    elif background == "beach":
        sky, sea, sand = ("#bfe5f9", "#d3edfb"), ("#4a9fd6", "#61b2e4"), ("#f2dcae", "#e8cb92")
        heights = (0, 0.375, 0.375, 0.625, 0.625, 1)
        picture = _bands(side, list(zip(heights, (*sky, *sea, *sand))))
    elif background == "night":
        picture = _stars(_bands(side, [(0, "#26305f"), (1, "#4a5590")]))
    else:
        picture = np.broadcast_to(_colour({"white": "#ffffff", "pink": "#ffd3df"}[background]), (side, side, 3))
    return _mapped(blocks(picture, side // BLOCKS) if style == "pixel art" else picture, style)


def _stars(picture: np.ndarray) -> np.ndarray:
    """Thirty small round stars at fixed places."""
    side = len(picture)
    places = np.random.default_rng(7).uniform(1, IMAGE - 1, (30, 2))
    at = (np.arange(side) + 0.5) * IMAGE / side
    distance = np.hypot(at[None, None] - places[:, :1, None], at[None, :, None] - places[:, 1:, None]).min(0)
    soft = np.clip((0.45 - distance) * side / IMAGE + 0.5, 0, 1)[..., None].astype(np.float32)
    return picture * (1 - soft) + soft * _colour("#fcea2b")


def _mapped(colours: np.ndarray, style: str) -> np.ndarray:
    """The styles that are a map of each colour (..., 3)."""
    if style == "negative":
        return 1 - colours
    if style == "grayscale":
        return np.repeat((colours @ _GRAY)[..., None], 3, -1)
    return colours


def shrunk(picture: np.ndarray, cell: int) -> np.ndarray:
    """Means of ``cell`` x ``cell`` pixels, a power of two: (n, m, ...) -> (n / cell, m / cell, ...)."""
    while cell > 1:
        picture = (picture[::2] + picture[1::2]) / 2
        picture = (picture[:, ::2] + picture[:, 1::2]) / 2
        cell //= 2
    return picture


def blocks(picture: np.ndarray, cell: int) -> np.ndarray:
    """The picture with every ``cell`` x ``cell`` pixels of one colour."""
    return np.repeat(np.repeat(shrunk(picture, cell), cell, 0), cell, 1)


def widest(field: np.ndarray, by: int) -> np.ndarray:
    """The largest value within a square of ``by`` pixels around each, (n, m, ...); of a mask, the mask widened."""
    for axis in (0, 1):
        padded = np.pad(field, [(by, by) if i == axis else (0, 0) for i in range(field.ndim)], "edge")
        length = field.shape[axis]
        field = padded.take(range(length), axis)
        for start in range(1, 2 * by + 1):
            field = np.maximum(field, padded.take(range(start, start + length), axis))
    return field


def connected_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a bool mask, as masks; cells that are one apart count as connected."""
    wide = widest(mask, 1)
    labels = np.where(wide, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = [padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)]
        spread = np.where(wide, np.maximum.reduce(around), 0)
        if (spread == labels).all():
            return [(labels == label) & mask for label in np.unique(labels[mask])]
        labels = spread


def box_mean(field: np.ndarray, by: int = 8) -> np.ndarray:
    """Means over squares of side 2 by + 1, zeros outside: (n, n, c) -> (n, n, c)."""
    padded = np.pad(field, [(by + 1, by), (by + 1, by), (0, 0)]).cumsum(0).cumsum(1)
    size = 2 * by + 1
    return (padded[size:, size:] - padded[:-size, size:] - padded[size:, :-size] + padded[:-size, :-size]) / size**2


def corner(thing: Thing, side: int) -> tuple[int, int, int]:
    """Left, top and side in pixels of a thing's square in a picture of ``side``."""
    scale = side / IMAGE
    return (
        round((thing.x - thing.size) * scale),
        round((thing.y - thing.size) * scale),
        max(round(2 * thing.size * scale), 8),
    )


@lru_cache(maxsize=1024)
def _rim(drawings: Drawings, name: str, layers: str, wide: int, reach: int) -> np.ndarray:
    """Opacity of a drawing and its rim, ``reach`` pixels larger on every side."""
    return widest(np.pad(drawings.sprite(name, "white", layers, wide).alpha, reach), reach)


def put(
    picture: np.ndarray,
    thing: Thing,
    drawings: Drawings,
    style: str,
    side: int | None = None,
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Draws a thing into a picture, parts outside it cut off.

    The picture is (side, side, 3), or with ``side`` a cut of one whose top left pixel is ``origin`` (row, column).
    """
    side = len(picture) if side is None else side
    left, top, wide = corner(thing, side)
    left, top = left - origin[1], top - origin[0]
    if style in LINES:
        alpha = drawings.sprite(thing.shape, thing.colour, "line", wide).alpha
        _paste(picture, left, top, alpha, _colour(_INK[style][1]))
        return
    layers = "color" if style == "no outlines" else "all"
    reach = max(round(RIM * side / IMAGE), 1)
    sprite = drawings.sprite(thing.shape, thing.colour, layers, wide)
    rim = _rim(drawings, thing.shape, layers, wide, reach)
    # The maps are affine, so they may come before the blending.
    _paste(picture, left - reach, top - reach, rim, _mapped(np.ones((1, 3), np.float32), style)[0])
    _paste(picture, left, top, sprite.alpha, _mapped(sprite.colour, style))


def _paste(picture: np.ndarray, left: int, top: int, alpha: np.ndarray, colour: np.ndarray) -> None:
    high, wide = alpha.shape
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + wide, picture.shape[1]), min(top + high, picture.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    soft = alpha[cut][..., None]
    ink = colour[cut] if colour.ndim == 3 else colour
    picture[y0:y1, x0:x1] = picture[y0:y1, x0:x1] * (1 - soft) + ink * soft


def compose(scene: Scene, drawings: Drawings, side: int = SIDE) -> np.ndarray:
    """A scene as (side, side, 3) float32 in [0, 1]; ``side`` is a multiple of 64."""
    picture = np.array(ground(scene.background, scene.style, side))
    for thing in scene.things:
        put(picture, thing, drawings, scene.style)
    return blocks(picture, side // BLOCKS) if scene.style == "pixel art" else picture


def render(scene: Scene, drawings: Drawings, side: int = SIDE) -> Image.Image:
    """A scene as an RGB picture."""
    return Image.fromarray((compose(scene, drawings, side) * 255 + 0.5).astype(np.uint8))


def as_array(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Any picture as (side, side, 3) float32 in [0, 1], squeezed to a square."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    how = Image.Resampling.BOX if min(picture.size) >= side else Image.Resampling.BICUBIC
    return np.asarray(picture.convert("RGB").resize((side, side), how), np.float32) / 255


def cover(things: tuple[Thing, ...], drawings: Drawings, side: int, margin: float = 0.0) -> np.ndarray:
    """Where things and their rims are, ``margin`` units around them too: (side, side) bool."""
    mask = np.zeros((side, side, 3), np.float32)
    reach = max(round((RIM + margin) * side / IMAGE), 1)
    for thing in things:
        left, top, wide = corner(thing, side)
        rim = _rim(drawings, thing.shape, "all", wide, reach)
        _paste(mask, left - reach, top - reach, rim, np.ones(3, np.float32))
    return mask[..., 0] > 0.5
