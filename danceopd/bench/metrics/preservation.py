"""What an edit preserved: PSNR and SSIM outside the edited region, and how much changed there.

The edited region is, in this order: the given mask, if it marks anything (masks.py); where the target differs from the
source; where a teacher's image does; else, or where that shows no change, where the output itself does. The last rule
takes the region from the output under test, so its metrics have names of their own (`…_own`) and flatter models that
change too much. The others give every model the same region, and are hard on a correct edit in another place: an object
added elsewhere than in the target counts as a change outside.

Two images differ where, after both are averaged over 3x3 pixels at working size (shrunk by a whole factor until the
short side is about 256 pixels), a channel differs by more than `STEP` of 255. Isolated pixels are dropped, and the
region is dilated by about 1 % of the side, so that soft edges belong to the edit. PSNR is of all pixels outside at full
size. SSIM (Wang et al. 2004) is of luma at working size, with the region made equal in both images, averaged outside.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat

from danceopd.bench.metrics.masks import read_mask

STEP = 12
"""Of 255: more than a decoder's error, less than an edit's change."""
PSNR_TOP = 60.0
"""Upper limit in dB; rounding to 8 bits alone gives 58.9 dB."""
LEAST_OUTSIDE = 0.01
"""Share of the image; with less outside the region there is nothing to preserve."""
WORKING = 256
SSIM_SMALLEST = 6
"""Smallest side in pixels, for the reflected border of SSIM's window."""


def fitted(image: Image.Image, like: Image.Image) -> Image.Image:
    """The image resized to the size of another one."""
    return image if image.size == like.size else image.resize(like.size, Image.Resampling.LANCZOS)


def working(image: Image.Image) -> Image.Image:
    """The image shrunk by a whole factor, so that its short side is about 256 pixels."""
    factor = max(1, round(min(image.size) / WORKING))
    return image if factor == 1 else image.reduce(factor)


def _different(one: Image.Image, other: Image.Image) -> Image.Image:
    """Where two images of one working size differ, white on black, without isolated pixels."""
    blur = ImageFilter.BoxBlur(1)
    bands = ImageChops.difference(one.filter(blur), other.filter(blur)).split()
    most = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    white = _above(most, STEP)
    return ImageChops.darker(white, _above(white.filter(blur), 255 * 2.5 / 9))  # itself and at least two neighbours


def _dilated(white: Image.Image) -> Image.Image:
    reach = max(1, round(min(white.size) / 85))
    return _above(white.filter(ImageFilter.BoxBlur(reach)), 0)


def _above(gray: Image.Image, value: float) -> Image.Image:
    return gray.point([255 if level > value else 0 for level in range(256)])


def region(source: Image.Image, reference: Image.Image) -> np.ndarray:
    """(h, w) bool at working size: the edited region by a reference edit; see the module."""
    return _as_bool(_dilated(_different(working(source), working(fitted(reference, source)))))


def masked(source: Image.Image, mask: Image.Image | Path) -> np.ndarray:
    """(h, w) bool at working size: what a mask marks (`masks`), stretched over the source."""
    return _as_bool(working(read_mask(mask).resize(source.size, Image.Resampling.NEAREST)), 127)


def _as_bool(gray: Image.Image, above: int = 0) -> np.ndarray:
    return np.asarray(gray) > above


def psnr(one: Image.Image, other: Image.Image) -> float:
    """PSNR in dB of two RGB images of one size; infinite for equal ones."""
    import torch  # imported late: reports of finished benches import this module without torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = (torch.from_numpy(np.array(part)).float() for part in (one, other))
    return float(peak_signal_noise_ratio(a, b, data_range=255.0))


def ssim(one: Image.Image, other: Image.Image) -> np.ndarray:
    """(h, w): the SSIM at each pixel of two luma images of one size, exact to 0.001 where both are flat (fp32)."""
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
    """Metrics of an edit of `source` (RGB images; the others are resized to its size):

    `psnr_outside` (dB), `ssim_outside`: similarity to the source outside the region, left out when the region is the
    whole image; with `_own` where the region is that of the output itself. `changed_outside`: share of the outside that
    the output changed. `edited`: the region's share of the image. `changed`: share that the output changed;
    `unchanged`: 1.0 when none. `psnr_target`, `ssim_target`: similarity to the target, where there is one.
    """
    image = fitted(image, source)
    small, mine = working(source), working(image)
    touched = _different(small, mine)
    changed = _as_bool(touched)
    expected = target or reference
    if mask is not None and (marked := masked(source, mask)).any():
        where, own = marked, ""
    elif expected is not None and (changes := region(source, expected)).any():
        where, own = changes, ""
    else:
        where, own = _as_bool(_dilated(touched)), "_own"
    found = {"edited": where.mean(), "changed": changed.mean(), "unchanged": not changed.any()}
    windowed = min(small.size) >= SSIM_SMALLEST
    luma, my_luma = small.convert("L"), mine.convert("L")
    outside = ~where
    if outside.mean() >= LEAST_OUTSIDE:
        hidden = Image.fromarray(where.astype(np.uint8) * 255)
        whole = hidden.resize(source.size, Image.Resampling.NEAREST)
        rest = 1 - ImageStat.Stat(whole).mean[0] / 255
        # with equal pixels inside the region, the error of the whole image is that outside
        likeness = psnr(source, Image.composite(source, image, whole)) + 10 * math.log10(rest)
        found["psnr_outside" + own] = min(PSNR_TOP, likeness)
        leaked = _as_bool(_different(small, Image.composite(small, mine, hidden)))  # nothing inside to blur outwards
        found["changed_outside" + own] = leaked[outside].mean()
        if windowed:
            found["ssim_outside" + own] = ssim(luma, Image.composite(luma, my_luma, hidden))[outside].mean()
    if target is not None:
        goal = fitted(target, source)
        found["psnr_target"] = min(PSNR_TOP, psnr(goal, image))
        if windowed:
            found["ssim_target"] = ssim(working(goal).convert("L"), my_luma).mean()
    return {name: float(value) for name, value in found.items()}
