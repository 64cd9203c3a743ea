"""`degrade`: an image goes in, a worse copy of the same size comes out: blurred, JPEG-compressed, noisy or downscaled.

The result is a function of (image, kind, seed): the strength is drawn from the seed, in a range where the content can
still be seen. Lengths are shares of the shorter side, so that images of 64 and of 1024 pixels are degraded alike.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter


def degrade(image: Image.Image, kind: str, seed: int) -> Image.Image:
    """The image in RGB after a degradation "blur", "jpeg", "noise" or "downscale"; KeyError for another kind."""
    picture, rng = image.convert("RGB"), np.random.default_rng([seed, *kind.encode()])
    return _KINDS[kind](picture, rng)


def _blur(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur with a radius of 1 to 3 % of the side, and at least half a pixel."""
    radius = max(0.5, rng.uniform(0.01, 0.03) * min(picture.size))
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _jpeg(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """JPEG of quality 5 to 25."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(5, 26)))
    with Image.open(file) as opened:
        return opened.convert("RGB")


def _noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """White noise with a standard deviation of 5 to 20 % of the range."""
    values = np.asarray(picture, dtype=np.float32)
    values = values + 255 * rng.uniform(0.05, 0.2) * rng.standard_normal(values.shape, dtype=np.float32)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _downscale(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Down to between a half and a quarter of each side, and back up."""
    factor = rng.uniform(2, 4)
    small = [max(1, round(side / factor)) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)


_KINDS = {"blur": _blur, "jpeg": _jpeg, "noise": _noise, "downscale": _downscale}
