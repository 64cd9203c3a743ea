"""Masks as people have them: an image that marks what an edit may change goes in, white on black comes out.

White marks on black. Where nothing is brighter than half, every level above 0 marks: segmentation tools write 0 and 1,
or a number for each object. An alpha channel that varies is the mask: where the opaque part is a picture, its
transparent part marks (as in OpenAI's edits); where it is drawn in two colours, the brighter one does; where it is of
one colour, the smaller of both parts does. `about_masks` says in words what was assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from danceopd.errors import UserError

ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
DRAWN = 16
"""A mask's opaque part has at most so many colours; a picture has more."""
ASSUMED = {
    "levels": "{} nothing brighter than half, so every level above 0 marks what may change",
    "opaque": "{} an alpha channel, of which the opaque part is taken for what may change",
    "transparent": "{} an alpha channel, of which the transparent part is taken for what may change",
    "large": "{} more than half of the picture marked; white is what may change, so invert masks of what must stay",
    "empty": "{} nothing marked, so the region is found as without a mask",
}
"""What was assumed of a mask -> how it is said."""


def read_mask(mask: Image.Image | Path) -> Image.Image:
    """White (what the edit may change) on black, mode L; UserError for a path that is no readable image."""
    return _read(mask)[0]


def about_masks(masks: Iterable[Path]) -> list[str]:
    """What is assumed of mask files, a line for each kind, with its number and its first file."""
    found: dict[str, list[Path]] = {}
    for path in dict.fromkeys(masks):
        image, kind = _read(path)
        share = np.asarray(image).mean() / 255
        for what in (kind, "empty" if share == 0 else "large" if share > 0.5 else ""):
            found.setdefault(what, []).append(path)
    lines = []
    for what, words in ASSUMED.items():
        if paths := found.get(what):
            more = f" and {len(paths) - 1} more masks have" if len(paths) > 1 else " has"
            lines.append(words.format(f"mask {paths[0].name}{more}"))
    return lines


def _read(mask: Image.Image | Path) -> tuple[Image.Image, str]:
    """The mask, and which of `ASSUMED` it needed."""
    image = mask if isinstance(mask, Image.Image) else _opened(mask)
    if image.mode in ALPHA or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        opaque = pixels[..., 3] > 127
        if opaque.any() and not opaque.all():
            return _from_alpha(pixels, opaque)
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64))
    else:
        levels = np.asarray(image.convert("RGB")).max(-1).astype(np.float64)
    half = 0.5 if image.mode == "1" else 127.5 if levels.max() <= 255 else 32767.5
    if levels.max() > half:
        return _white(levels > half), ""
    return _white(levels > 0), "levels" if (levels > 0).any() else ""


def _from_alpha(pixels: np.ndarray, opaque: np.ndarray) -> tuple[Image.Image, str]:
    """The mask in (h, w, 4) uint8 pixels that are not all opaque."""
    colours = np.unique(pixels[opaque][:, :3], axis=0)
    if len(colours) > DRAWN:
        return _white(~opaque), "transparent"
    bright = pixels[..., :3].max(-1) > 127
    if bright[opaque].any() and not bright[opaque].all():
        return _white(bright & opaque), "opaque"
    return (_white(opaque), "opaque") if opaque.mean() <= 0.5 else (_white(~opaque), "transparent")


def _white(marked: np.ndarray) -> Image.Image:
    return Image.fromarray(marked.astype(np.uint8) * 255)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"mask {path} cannot be read ({error}); replace it") from None
