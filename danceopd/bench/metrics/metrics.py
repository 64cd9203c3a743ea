"""Judge-free metrics of one image: what an edit preserved, sharpness, saturation, and those of optional networks.

`measure` costs milliseconds. `collapse.measure_set` measures all images of a model; `features` adds CLIP, DINO and
Lite0. None of these is a score: a copy of the source preserves everything. They show how a merge fails: blurred,
oversaturated, changed outside the edit, collapsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops, ImageStat

from danceopd.bench import statistics
from danceopd.bench.metrics.collapse import constant
from danceopd.bench.metrics.preservation import fitted, preservation
from danceopd.bench.suites.protocol import Item
from danceopd.data.images import picture

if TYPE_CHECKING:
    from danceopd.bench.metrics.features import Network

ASPECT = 0.04
"""Aspect ratios that differ by less are equal: sizes are rounded to a multiple of the model's patches."""


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of 8-bit luma (Pech-Pacheco et al. 2000); 0 for one colour; blur lowers it."""
    luma = np.asarray(image.convert("L"), np.int16)
    if min(luma.shape) < 3:
        return 0.0
    sides = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((sides - 4 * luma[1:-1, 1:-1]).astype(np.float32).var())


def saturation(image: Image.Image) -> float:
    """Mean chroma, the largest minus the smallest channel of a pixel, from 0 (gray) to 1."""
    red, green, blue = image.split()
    top = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    bottom = ImageChops.darker(ImageChops.darker(red, green), blue)
    return ImageStat.Stat(ImageChops.subtract(top, bottom)).mean[0] / 255


def measure(
    item: Item,
    image: Image.Image | Path,
    source: Image.Image | Path | None = None,
    reference: Image.Image | Path | None = None,
    networks: Sequence[Network] = (),
) -> dict[str, float]:
    """Every metric that one image of an item allows, by name.

    `source` is the item's own when not given; `reference` is a teacher's image of the same item, from which the edited
    region is taken when the item has neither mask nor target (see `preservation`). Always: `sharpness`, `saturation`,
    `constant` (1.0: one colour). With a source: `aspect_changed` (1.0: another aspect ratio), `sharpness_drift`
    (octaves) and `saturation_drift` against it, and the metrics of `preservation`. Each network adds its own.
    """
    image = picture(image)
    given = source if source is not None else item.source
    before = None if given is None else picture(given)
    target = None if item.target is None else picture(item.target)
    sharp, chroma = sharpness(image), saturation(image)
    found = {"sharpness": sharp, "saturation": chroma, "constant": float(constant(image))}
    if before is not None:
        stretch = image.width * before.height / (image.height * before.width)
        found["aspect_changed"] = float(abs(math.log(stretch)) > ASPECT)
        if image.size != before.size:
            image = fitted(image, before)
            sharp, chroma = sharpness(image), saturation(image)
        found["sharpness_drift"] = math.log2((sharp + 1) / (sharpness(before) + 1))
        found["saturation_drift"] = chroma - saturation(before)
        found |= preservation(before, image, item.mask, target, None if reference is None else picture(reference))
    for network in networks:
        found |= network.measure(item, image, before, target)
    return {name: round(value, 6) for name, value in found.items()}


def metric_means(rows: Sequence[dict], model: str, capability: str) -> dict[str, dict[str, Any]]:
    """metric -> {mean, n, low, high}: the macro mean over categories of a model's ordinary rows that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["model"] == model and row["capability"] == capability and statistics.ordinary(row):
            for name, value in (row.get("metrics") or {}).items():
                found.setdefault(name, {}).setdefault(row["category"], []).append(value)
    sums = {name: statistics.macro(list(groups.values()), share=False) for name, groups in found.items()}
    return {name: {key: figure[key] for key in ("mean", "n", "low", "high")} for name, figure in sums.items()}
