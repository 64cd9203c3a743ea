"""Descriptors of outlines, independent of colours: a picture and windows go in, unit vectors of edge directions out.

A histogram of oriented gradients (Dalal and Triggs, 2005): unsigned directions, each cell normalised by the energy of
its neighbours, so that a line counts by its course and not by its darkness. Sums over cells come from an integral
image, so thousands of shifted and scaled windows cost a few look-ups each.
"""

from __future__ import annotations

import numpy as np

BINS = 9
"""Directions between 0 and 180 degrees."""
CELLS = 9
"""Cells a side of a window."""
LEAST = 0.03
"""Gradients below this, of colours in [0, 1], are noise."""
PAD = 40
"""Empty pixels around a picture, so that a window may reach beyond it."""


def orientations(picture: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Integral image (n + 2 PAD + 1, n + 2 PAD + 1, BINS) of edge strength by direction of a picture (n, n, 3).

    Of the three channels the one with the steepest edge counts, by the square root of its strength. ``mask`` (n, n)
    weighs the edges.
    """
    down, across = np.gradient(picture, axis=(0, 1))
    steep = np.hypot(down, across)
    channel = steep.argmax(-1)[..., None]
    steep, down, across = (np.take_along_axis(part, channel, -1)[..., 0] for part in (steep, down, across))
    strength = np.sqrt(np.where(steep > LEAST, steep, 0))
    if mask is not None:
        strength = strength * mask
    angle = np.mod(np.arctan2(down, across), np.pi) * (BINS / np.pi)
    low = np.floor(angle)
    share = (angle - low).astype(np.float32)
    low = low.astype(int) % BINS
    planes = np.zeros((*picture.shape[:2], BINS), np.float32)
    rows, columns = np.indices(low.shape, sparse=True)
    planes[rows, columns, low] = strength * (1 - share)
    planes[rows, columns, (low + 1) % BINS] += strength * share
    planes = np.pad(planes, [(PAD + 1, PAD), (PAD + 1, PAD), (0, 0)])
    return planes.cumsum(0, dtype=np.float64).cumsum(1)


def mirrored(descriptors: np.ndarray) -> np.ndarray:
    """Descriptors (..., CELLS * CELLS * BINS) of the same windows seen in a mirror."""
    cells = descriptors.reshape(*descriptors.shape[:-1], CELLS, CELLS, BINS)
    return cells[..., ::-1, [-k % BINS for k in range(BINS)]].reshape(descriptors.shape)


def windows(integral: np.ndarray, centres: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Unit vectors (k, CELLS * CELLS * BINS) of k square windows: centres (k, 2) as (x, y), halves (k,) in pixels."""
    step = np.linspace(-1, 1, CELLS + 1)
    last = len(integral) - 1.001
    across = np.clip(centres[:, :1] + step * halves[:, None] + PAD, 0, last)
    down = np.clip(centres[:, 1:] + step * halves[:, None] + PAD, 0, last)
    x, y = across.astype(int), down.astype(int)
    fx, fy = (across - x)[:, None, :, None], (down - y)[:, :, None, None]
    y, x = y[:, :, None], x[:, None, :]
    corners = (1 - fy) * ((1 - fx) * integral[y, x] + fx * integral[y, x + 1])
    corners += fy * ((1 - fx) * integral[y + 1, x] + fx * integral[y + 1, x + 1])
    cells = corners[:, 1:, 1:] - corners[:, :-1, 1:] - corners[:, 1:, :-1] + corners[:, :-1, :-1]
    cells = cells.astype(np.float32) / (4 * halves[:, None, None, None] ** 2 / CELLS**2)
    energy = np.pad((cells**2).sum(-1), [(0, 0), (1, 1), (1, 1)])
    around = sum(energy[:, i : i + CELLS, j : j + CELLS] for i in range(3) for j in range(3))
    cells = cells / np.sqrt(around / 9 + 1e-3)[..., None]
    flat = cells.reshape(len(cells), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
