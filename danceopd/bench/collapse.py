"""Sets of pictures that say too little: near-duplicates, constant pictures, seeds that draw the same.

A picture is known by its perceptual hash (signs of the 63 lowest frequencies of a 32x32 luma DCT: Zauner 2010) and
by an 8x8 colour thumbnail; two are near-duplicates when the hashes differ in at most `BITS` bits and the thumbnails by
at most `SHADE`. The hash alone knows no colour, the thumbnail alone no shape. Seed diversity is the mean distance
between pictures of one item; beside it stands the distance between items, which a collapsed model loses as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from danceopd.bench.suites import picture

BITS = 6
SHADE = 0.03
"""Mean distance of the thumbnails' channels, 0 to 1."""
FLAT = 2.0
"""A picture whose channels deviate by less than this (of 255) shows nothing."""
BLOCK = 1024


def constant(image: Image.Image) -> bool:
    """Whether a picture is of one colour, as failed runs leave them (black, gray, a single tint)."""
    return max(ImageStat.Stat(image).stddev) < FLAT


@cache
def _cosines(side: int = 32, kept: int = 8) -> np.ndarray:
    """(kept, side): the first rows of the DCT-II."""
    n, k = np.arange(side), np.arange(kept)[:, None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * side))


@dataclass(frozen=True)
class Print:
    """What a picture is known by: `bits` (63,) of -1 and 1, `shades` (192,) from 0 to 1."""

    bits: np.ndarray
    shades: np.ndarray


def fingerprint(image: Image.Image) -> Print:
    """Of one RGB picture."""
    small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    waves = (_cosines() @ small @ _cosines().T).ravel()[1:]  # the mean brightness is no shape
    waves[abs(waves) < 1e-6] = 0.0
    shades = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255
    return Print(np.where(waves > np.median(waves), 1, -1).astype(np.float32), shades)


def alike(prints: Sequence[Print]) -> list[tuple[int, int]]:
    """Pairs (i < j) of near-duplicates."""
    if not prints:
        return []
    bits, shades = np.stack([p.bits for p in prints]), np.stack([p.shades for p in prints])
    limit = bits.shape[1] - 2 * BITS  # the product of two hashes counts equal minus unequal bits
    pairs = []
    for start in range(0, len(prints), BLOCK):
        near = np.argwhere(bits[start : start + BLOCK] @ bits.T >= limit)
        pairs += [(i + start, j) for i, j in near.tolist() if i + start < j]
    return [(i, j) for i, j in pairs if float(abs(shades[i] - shades[j]).mean()) <= SHADE]


def _groups(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected groups of two or more, the largest first."""
    root = list(range(count))

    def top(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in pairs:
        root[top(j)] = top(i)
    found: dict[int, list[int]] = {}
    for i in range(count):
        found.setdefault(top(i), []).append(i)
    return sorted((g for g in found.values() if len(g) > 1), key=len, reverse=True)


def _spread(shades: np.ndarray) -> float:
    """Mean root-mean-square distance over all pairs of rows; 0 with fewer than two."""
    n = len(shades)
    if n < 2:
        return 0.0
    squares = (shades.astype(float) ** 2).sum(1)
    apart = squares[:, None] + squares - 2 * shades.astype(float) @ shades.astype(float).T
    return float(np.sqrt(np.maximum(apart, 0) / shades.shape[1]).sum() / (n * (n - 1)))


def measure_set(images: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's pictures are as a set. `images`: item key -> a picture or path, or several (one a seed).

    Plain JSON: `n` pictures; `constant` and `near_duplicates`, shares of them (a near-duplicate is like a picture of
    ANOTHER item); `groups`, up to ten groups of item keys that look alike, the largest first; `item_diversity`, the
    mean distance (0 to 1) of the items' first pictures; `seed_diversity`, of one item's pictures, averaged over items,
    None where no item has two; `same_seeds`, the share of those items in which two seeds drew near-duplicates.
    """
    keys: list[str] = []
    prints: list[Print] = []
    flat = 0
    for key, given in images.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            image = picture(value)
            flat += constant(image)
            keys.append(key)
            prints.append(fingerprint(image))
    pairs = alike(prints)
    strangers = [(i, j) for i, j in pairs if keys[i] != keys[j]]
    doubled = {i for pair in strangers for i in pair}
    shades: dict[str, list[np.ndarray]] = {}
    for key, found in zip(keys, prints):
        shades.setdefault(key, []).append(found.shades)
    several = {key: np.stack(group) for key, group in shades.items() if len(group) > 1}
    twins = {keys[i] for i, j in pairs if keys[i] == keys[j]}
    first = np.stack([group[0] for group in shades.values()]) if shades else np.zeros((0, 1))
    n = len(prints)
    return {
        "n": n,
        "constant": flat / n if n else None,
        "near_duplicates": len(doubled) / n if n else None,
        "groups": [sorted({keys[i] for i in group}) for group in _groups(n, strangers)[:10]],
        "item_diversity": round(_spread(first), 6) if len(first) > 1 else None,
        "seed_diversity": round(float(np.mean([_spread(g) for g in several.values()])), 6) if several else None,
        "same_seeds": len(twins) / len(several) if several else None,
    }
