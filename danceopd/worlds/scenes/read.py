"""`read`: an image goes in, the scene that explains it best comes out, with how well it does (analysis by synthesis).

Every image gets the scene that resembles it most, whatever it shows; ``psnr`` and ``unexplained`` measure the
difference, and the scorer decides what is too much. The search of a tier is in ``read_cells`` and ``read_free``; here
the found scene is rendered and compared with the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from danceopd.errors import UserError
from danceopd.worlds.scenes.grammar import IMAGE, SIZES, TIERS, Scene
from danceopd.worlds.scenes.read_cells import read_cells
from danceopd.worlds.scenes.read_free import read_free
from danceopd.worlds.scenes.render import render, tint

BEST_PSNR = 60.0
"""The largest PSNR, in dB: that of an identical picture."""
FAR, FLOOR = 0.20, 0.11
"""Colour distance (root mean square over channels, in [0, 1]) beyond which a pixel is unexplained: ``FAR`` times
the contrast that the style leaves (0.45 for ``night``), and never less than ``FLOOR``."""


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    ``scene`` is its best explanation, ``psnr`` that of the re-drawn scene in dB (at most 60), ``unexplained``
    the share of pixels in [0, 1] that the re-drawn scene gets wrong, ``image`` the (64, 64, 3) uint8 that was read.
    """

    scene: Scene
    psnr: float
    unexplained: float
    image: np.ndarray = field(repr=False, compare=False)


def as_array(image: Any) -> np.ndarray:
    """A PIL image or a uint8 array as (64, 64, 3) uint8; UserError for anything else."""
    if isinstance(image, Reading):
        return image.image
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.shape != (IMAGE, IMAGE, 3) or array.dtype != np.uint8:
        raise UserError(
            f"an image of the scenes suite must be {IMAGE}x{IMAGE} RGB with 8 bits a channel, this one has shape "
            f"{array.shape} and type {array.dtype}: generate it at height={IMAGE}, width={IMAGE}"
        )
    return array


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images (64, 64, 3), at most 60; ``where`` (64, 64) bool."""
    error = (a.astype(np.float32) - b.astype(np.float32)) ** 2
    if where is not None:
        error = error[where]
    mean = float(error.mean()) / 255**2 if error.size else 0.0
    return BEST_PSNR if mean <= 10 ** (-BEST_PSNR / 10) else float(-10 * np.log10(mean))


def contrast(style: str) -> float:
    """How much of a colour difference a style leaves, as a share."""
    ends = tint(np.array([[0.0] * 3, [255.0] * 3], np.float32), style)
    return float(np.abs(ends[1] - ends[0]).mean() / 255)


def tier_of(scene: Scene) -> str:
    """The tier that a scene belongs to, by the sizes of its things (``cells`` for an empty one)."""
    return "free" if any(t.size in SIZES["free"] for t in scene.things) else "cells"


def _reading(scene: Scene, image: np.ndarray) -> Reading:
    picture = render(scene)
    distance = np.sqrt(((image.astype(np.float32) - picture) ** 2).mean(-1)) / 255
    far = distance > max(FAR * contrast(scene.style), FLOOR)
    return Reading(scene, psnr(picture, image), float(far.mean()), image)


def read_many(images: Sequence[Any], tier: str = "cells") -> list[Reading]:
    """Read many images at once; see ``read``. A ``Reading`` among them is passed through."""
    if tier not in TIERS:
        raise UserError(f"there is no tier {tier!r} in the scenes world: use one of {', '.join(TIERS)}")
    done: list[Reading | None] = [image if isinstance(image, Reading) else None for image in images]
    todo = [i for i, reading in enumerate(done) if reading is None]
    if todo:
        arrays = np.stack([as_array(images[i]) for i in todo])
        scenes = read_cells(arrays) if tier == "cells" else [read_free(a) for a in arrays]
        for i, scene, array in zip(todo, scenes, arrays):
            done[i] = _reading(scene, array)
    return [reading for reading in done if reading is not None]


def read(image: Any, tier: str = "cells") -> Reading:
    """The scene that explains an image best. ``image``: PIL, uint8 array (64, 64, 3), or a ``Reading``."""
    return read_many([image], tier)[0]
