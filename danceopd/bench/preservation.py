"""What an edit left alone: PSNR and SSIM outside the edited region.

The region is, in this order: a given mask; where a picture known to be right differs from the source; where a
teacher's picture does; else, or where that shows no change, where the output itself does. The last rule asks the
output about itself, so its figures have names of their own (`…_own`) and flatter models that change too much. The
others give every model one region, and are hard on an edit that may stand elsewhere: an object added at another place
than the target's is a change outside.

Two pictures differ where, after both are averaged over 3x3 pixels at working size (shrunk by a whole factor until the
short side is about 256 pixels), a channel is apart by more than `STEP` of 255. Lone pixels are dropped, and the region
grows by about 1 % of the side, so that soft edges belong to the edit. PSNR is of all pixels outside in full size. SSIM
(Wang et al. 2004) is of luma in working size, with the region filled alike in both pictures, averaged outside.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat

from danceopd.bench.suites import picture

STEP = 12
"""Of 255: more than a decoder's error, less than an edit's change."""
PSNR_TOP = 60.0
"""dB. Rounding to 8 bits leaves 58.9 dB, so more than this says nothing."""
LEAST_OUTSIDE = 0.01
"""Share of the picture: an edit that leaves less than this leaves nothing to preserve."""
WORKING = 256
SSIM_SMALLEST = 6
"""Pixels: the window's reflected border needs them."""


def fitted(image: Image.Image, like: Image.Image) -> Image.Image:
    """The picture in the size of another one, as suites compare them."""
    return image if image.size == like.size else image.resize(like.size, Image.Resampling.LANCZOS)


def working(image: Image.Image) -> Image.Image:
    """The picture, shrunk by a whole factor so that its short side is about 256 pixels."""
    factor = max(1, round(min(image.size) / WORKING))
    return image if factor == 1 else image.reduce(factor)


def _apart(one: Image.Image, other: Image.Image) -> Image.Image:
    """Where two pictures of one working size differ, white on black, without lone pixels."""
    blur = ImageFilter.BoxBlur(1)
    bands = ImageChops.difference(one.filter(blur), other.filter(blur)).split()
    most = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    white = _above(most, STEP)
    return ImageChops.darker(white, _above(white.filter(blur), 255 * 2.5 / 9))  # itself and two neighbours


def _grown(white: Image.Image) -> Image.Image:
    reach = max(1, round(min(white.size) / 85))
    return _above(white.filter(ImageFilter.BoxBlur(reach)), 0)


def _above(gray: Image.Image, value: float) -> Image.Image:
    return gray.point([255 if level > value else 0 for level in range(256)])


def region(source: Image.Image, reference: Image.Image) -> np.ndarray:
    """(h, w) bool in working size: where an edit is, told from a picture that made it; see the module."""
    return _true(_grown(_apart(working(source), working(fitted(reference, source)))))


def masked(source: Image.Image, mask: Image.Image | Path) -> np.ndarray:
    """(h, w) bool in working size: a mask's white part, stretched over the source."""
    gray = mask.convert("L") if isinstance(mask, Image.Image) else picture(mask).convert("L")
    return _true(working(gray.resize(source.size, Image.Resampling.NEAREST)), 127)


def _true(gray: Image.Image, above: int = 0) -> np.ndarray:
    return np.asarray(gray) > above


def psnr(one: Image.Image, other: Image.Image) -> float:
    """dB between two RGB pictures of one size; infinite for equal ones."""
    import torch  # not needed to look at finished benches, which import this module
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = (torch.from_numpy(np.array(part)).float() for part in (one, other))
    return float(peak_signal_noise_ratio(a, b, data_range=255.0))


def ssim(one: Image.Image, other: Image.Image) -> np.ndarray:
    """(h, w): the SSIM of each place of two luma pictures of one size, exact to 0.001 where both are flat (fp32)."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.array(part, np.float32))[None, None] for part in (one, other))
    _, places = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    return places[0, 0].numpy()


def preservation(
    source: Image.Image,
    image: Image.Image,
    mask: Image.Image | Path | None = None,
    target: Image.Image | None = None,
    reference: Image.Image | None = None,
) -> dict[str, float]:
    """Figures about an edit of `source` (RGB pictures; others are brought to its size):

    `psnr_outside` (dB), `ssim_outside`: likeness outside the region, not there when the region is all; with `_own`
    where nothing but the output tells the region. `changed_outside`: share of the outside that the output changed.
    `edited`: the region's share of the picture. `changed`: share that the output changed; `unchanged`: 1.0 when none.
    `psnr_target`, `ssim_target`: likeness to the target, where there is one.
    """
    image = fitted(image, source)
    small, mine = working(source), working(image)
    touched = _apart(small, mine)
    changed = _true(touched)
    told = target or reference
    if mask is not None:
        where, own = masked(source, mask), ""
    elif told is not None and (shown := region(source, told)).any():
        where, own = shown, ""
    else:
        where, own = _true(_grown(touched)), "_own"
    found = {"edited": where.mean(), "changed": changed.mean(), "unchanged": not changed.any()}
    windowed = min(small.size) >= SSIM_SMALLEST
    luma, my_luma = small.convert("L"), mine.convert("L")
    outside = ~where
    if outside.mean() >= LEAST_OUTSIDE:
        hidden = Image.fromarray(where.astype(np.uint8) * 255)
        whole = hidden.resize(source.size, Image.Resampling.NEAREST)
        rest = 1 - ImageStat.Stat(whole).mean[0] / 255
        # alike inside the region, the whole picture's error is that outside
        likeness = psnr(source, Image.composite(source, image, whole)) + 10 * math.log10(rest)
        found["psnr_outside" + own] = min(PSNR_TOP, likeness)
        leaked = _true(_apart(small, Image.composite(small, mine, hidden)))  # nothing inside, nothing to blur outwards
        found["changed_outside" + own] = leaked[outside].mean()
        if windowed:
            found["ssim_outside" + own] = ssim(luma, Image.composite(luma, my_luma, hidden))[outside].mean()
    if target is not None:
        goal = fitted(target, source)
        found["psnr_target"] = min(PSNR_TOP, psnr(goal, image))
        if windowed:
            found["ssim_target"] = ssim(working(goal).convert("L"), my_luma).mean()
    return {name: float(value) for name, value in found.items()}
