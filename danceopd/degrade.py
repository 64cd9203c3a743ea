"""Worse copies of a source image: blurred, compressed, noisy, or small and enlarged again; of the same size.

A function of (image, kind, seed): the strength is drawn from the seed, in a range where the picture can still be read.
Lengths are shares of the shorter side, so that a picture of 64 pixels and one of 1024 suffer alike.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter


def degraded(image: Image.Image, kind: str, seed: int) -> Image.Image:
    """The picture as RGB after one of `recipe_gates.DEGRADATIONS`; KeyError for another kind."""
    picture, numbers = image.convert("RGB"), np.random.default_rng([seed, *kind.encode()])
    return _KINDS[kind](picture, numbers)


def _blur(picture: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """Gaussian, 1 to 3 % of the side, and at least half a pixel."""
    radius = max(0.5, numbers.uniform(0.01, 0.03) * min(picture.size))
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _jpeg(picture: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """Quality 5 to 25."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(numbers.integers(5, 26)))
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _noise(picture: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """White, of a deviation of 5 to 20 % of the range."""
    values = np.asarray(picture, dtype=np.float32)
    values = values + 255 * numbers.uniform(0.05, 0.2) * numbers.standard_normal(values.shape, dtype=np.float32)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _downscale(picture: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """To a half or less of each side, down to a quarter, and back."""
    factor = numbers.uniform(2, 4)
    small = [max(1, round(side / factor)) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


_KINDS = {"blur": _blur, "jpeg": _jpeg, "noise": _noise, "downscale": _downscale}
