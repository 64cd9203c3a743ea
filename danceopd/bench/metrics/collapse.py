"""Mode collapse: near-duplicate images of different prompts, images of one colour, seeds that make the same image.

An image's fingerprint is its perceptual hash (signs of the 63 lowest frequencies of a 32x32 luma DCT: Zauner 2010) and
an 8x8 colour thumbnail. Two images are near-duplicates when the hashes differ in at most `BITS` bits and the thumbnails
by at most `SHADE`: the hash alone ignores colour, the thumbnail alone ignores shape. Seed diversity is the mean
distance between images of one item; item diversity, between items, drops too when a model collapses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from danceopd.data.images import picture

BITS = 6
SHADE = 0.03
"""Mean distance of the thumbnails' channels, 0 to 1."""
FLAT = 2.0
"""An image whose channels have a standard deviation below this (of 255) shows nothing."""
BLOCK = 1024


def constant(image: Image.Image) -> bool:
    """Whether an image is of one colour, as failed runs produce (black, gray, a single tint)."""
    return max(ImageStat.Stat(image).stddev) < FLAT


@cache
def _cosines(side: int = 32, kept: int = 8) -> np.ndarray:
    """(kept, side): the first rows of the DCT-II."""
    n, k = np.arange(side), np.arange(kept)[:, None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * side))


@dataclass(frozen=True)
class Fingerprint:
    """An image's perceptual hash, `bits` (63,) of -1 and 1, and its thumbnail, `shades` (192,) from 0 to 1."""

    bits: np.ndarray
    shades: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB image."""
    small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    waves = (_cosines() @ small @ _cosines().T).ravel()[1:]  # without the mean brightness
    waves[abs(waves) < 1e-6] = 0.0
    shades = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255
    return Fingerprint(np.where(waves > np.median(waves), 1, -1).astype(np.float32), shades)


def near_duplicates(prints: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """The pairs (i < j) of near-duplicates."""
    if not prints:
        return []
    bits, shades = np.stack([p.bits for p in prints]), np.stack([p.shades for p in prints])
    limit = bits.shape[1] - 2 * BITS  # the dot product of two hashes is equal minus unequal bits
    pairs = []
    for start in range(0, len(prints), BLOCK):
        near = np.argwhere(bits[start : start + BLOCK] @ bits.T >= limit)
        pairs += [(i + start, j) for i, j in near.tolist() if i + start < j]
    return [(i, j) for i, j in pairs if float(abs(shades[i] - shades[j]).mean()) <= SHADE]


def _groups(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected components of two or more, the largest first."""
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
    """Mean root-mean-square distance over all pairs of rows; 0 for fewer than two."""
    n = len(shades)
    if n < 2:
        return 0.0
    squares = (shades.astype(float) ** 2).sum(1)
    apart = squares[:, None] + squares - 2 * shades.astype(float) @ shades.astype(float).T
    return float(np.sqrt(np.maximum(apart, 0) / shades.shape[1]).sum() / (n * (n - 1)))


def measure_set(images: Mapping[str, Any]) -> dict[str, Any]:
    """Collapse and diversity of a model's images. `images`: item key -> an image or path, or several (one a seed).

    Plain JSON: `n` images; `constant` and `near_duplicates`, shares of them (a near-duplicate is like an image of
    ANOTHER item); `groups`, up to ten groups of item keys that look alike, the largest first; `item_diversity`, the
    mean distance (0 to 1) of the items' first images; `seed_diversity`, of one item's images, averaged over items,
    None where no item has two; `same_seeds`, the share of those items in which two seeds made near-duplicates.
    """
    keys: list[str] = []
    prints: list[Fingerprint] = []
    flat = 0
    for key, given in images.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            image = picture(value)
            flat += constant(image)
            keys.append(key)
            prints.append(fingerprint(image))
    pairs = near_duplicates(prints)
    foreign = [(i, j) for i, j in pairs if keys[i] != keys[j]]
    duplicated = {i for pair in foreign for i in pair}
    shades: dict[str, list[np.ndarray]] = {}
    for key, found in zip(keys, prints):
        shades.setdefault(key, []).append(found.shades)
    several = {key: np.stack(group) for key, group in shades.items() if len(group) > 1}
    same = {keys[i] for i, j in pairs if keys[i] == keys[j]}
    first = np.stack([group[0] for group in shades.values()]) if shades else np.zeros((0, 1))
    n = len(prints)
    return {
        "n": n,
        "constant": flat / n if n else None,
        "near_duplicates": len(duplicated) / n if n else None,
        "groups": [sorted({keys[i] for i in group}) for group in _groups(n, foreign)[:10]],
        "item_diversity": round(_spread(first), 6) if len(first) > 1 else None,
        "seed_diversity": round(float(np.mean([_spread(g) for g in several.values()])), 6) if several else None,
        "same_seeds": len(same) / len(several) if several else None,
    }


def image_sets(rows: Sequence[Mapping[str, Any]], models: Sequence[str], folder: Path) -> dict[str, dict]:
    """Model -> `measure_set` of all of its images in the rows of a bench."""
    found: dict[str, dict[str, Path]] = {model: {} for model in models}
    for row in rows:
        if row["image"] is not None:
            found[row["model"]][f"{row['category']}/{row['key']}"] = folder / row["image"]
    return {model: measure_set(images) for model, images in found.items()}
