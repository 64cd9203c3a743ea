"""`render`: a scene goes in, a picture of 64x64 RGB pixels comes out, anti-aliased, the same bytes on every machine.

Shapes are polygons (or a disc) whose coverage is counted on an 8x8 grid inside each pixel. Colours lie at least
0.35 apart in RGB; backgrounds are mid-tones away from them. Each style is an injective map of the picture, so the
scene and the style can always be read from it: ``outline`` keeps a ring of each shape on paled
ground, ``negative`` inverts, ``night`` is an affine map into dark blue.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from danceopd.worlds.scenes.grammar import IMAGE, Scene, Thing

PALETTE = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 211, 30),
    "green": (30, 150, 60),
    "blue": (30, 80, 200),
    "purple": (130, 50, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
RING = 0.55
"""Inner radius of an ``outline`` shape as a share of the outer one."""
SUBPIXELS = 8


def _polygon(shape: str) -> np.ndarray:
    """Vertices (n, 2) of a unit shape around the origin, y pointing down."""
    if shape == "square":
        side = 0.86
        return np.array([(-side, -side), (side, -side), (side, side), (-side, side)])
    if shape == "triangle":
        return np.array([(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)])
    if shape == "diamond":
        return np.array([(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)])
    if shape == "cross":
        a = 0.34
        return np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    radii = [1.05 if i % 2 == 0 else 0.42 for i in range(10)]
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return np.array([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)])


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (in units of the radius) lie inside the shape; even-odd rule."""
    if shape == "circle":
        return x * x + y * y <= 0.96
    inside = np.zeros(x.shape, bool)
    corners = _polygon(shape)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


@lru_cache(maxsize=4096)
def coverage(shape: str, x: float, y: float, size: float, style: str = "flat") -> np.ndarray:
    """Share of each pixel that a thing covers: (64, 64) float32 in [0, 1]."""
    samples = (np.arange(IMAGE * SUBPIXELS) + 0.5) / SUBPIXELS
    out = np.zeros((IMAGE, IMAGE), np.float32)
    reach = int(size * 1.1) + 2
    x0, x1 = max(0, int(x) - reach), min(IMAGE, int(x) + reach + 1)
    y0, y1 = max(0, int(y) - reach), min(IMAGE, int(y) + reach + 1)
    px = (samples[x0 * SUBPIXELS : x1 * SUBPIXELS] - x)[None, :] / size
    py = (samples[y0 * SUBPIXELS : y1 * SUBPIXELS] - y)[:, None] / size
    px, py = np.broadcast_arrays(px, py)
    hit = _inside(shape, px, py)
    if style == "outline":
        hit = hit & ~_inside(shape, px / RING, py / RING)
    cells = hit.reshape(y1 - y0, SUBPIXELS, x1 - x0, SUBPIXELS)
    out[y0:y1, x0:x1] = cells.mean(axis=(1, 3))
    out.setflags(write=False)
    return out


@lru_cache(maxsize=16)
def ground(background: str) -> np.ndarray:
    """A background without style: (64, 64, 3) float32 in [0, 255]."""
    y, x = np.mgrid[0:IMAGE, 0:IMAGE].astype(np.float32)
    down = (y / (IMAGE - 1))[..., None]

    def rgb(*value: float) -> np.ndarray:
        return np.broadcast_to(np.array(value, np.float32), (IMAGE, IMAGE, 3))

    if background == "sky":
        image = rgb(135, 180, 220) * (1 - down) + rgb(190, 215, 230) * down
    elif background == "grass":
        image = rgb(125, 165, 105) + 10 * np.where((x // 2) % 2 == 0, 1.0, -1.0)[..., None]
    elif background == "sand":
        image = rgb(215, 190, 145) - 14 * down
    elif background == "checker":
        image = np.where((((x // 8) + (y // 8)) % 2 == 0)[..., None], rgb(165, 140, 150), rgb(125, 110, 125))
    else:
        image = rgb(150, 150, 150)
    image = np.ascontiguousarray(image, np.float32)
    image.setflags(write=False)
    return image


def tint(image: np.ndarray, style: str) -> np.ndarray:
    """The per-pixel part of a style: float image in, float image out."""
    if style == "negative":
        return 255 - image
    if style == "night":
        return 0.55 * image + np.array((0, 6, 70), np.float32)
    return image


def paint(canvas: np.ndarray, thing: Thing, style: str) -> np.ndarray:
    """The canvas with one thing laid over it (before the tint)."""
    alpha = coverage(thing.shape, thing.x, thing.y, thing.size, style)[..., None]
    return canvas + alpha * (np.array(PALETTE[thing.colour], np.float32) - canvas)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: (64, 64, 3) uint8."""
    canvas = ground(scene.background)
    if scene.style == "outline":
        canvas = 0.55 * canvas + 0.45 * 255
    for thing in scene.things:
        canvas = paint(canvas, thing, scene.style)
    return np.clip(np.rint(tint(canvas, scene.style)), 0, 255).astype(np.uint8)


def object_mask(thing: Thing) -> np.ndarray:
    """Where a thing is, whatever the style: (64, 64) bool."""
    return coverage(thing.shape, thing.x, thing.y, thing.size) > 0.5
