"""Read images of the ``cells`` tier: find the best of 49 templates for each cell, under each style and background.

Every (shape, colour) and the empty cell is rendered once for each of the 20 hypotheses of style x background and each
row of the grid (columns look alike), and kept. A squared distance is then one matrix product for a whole batch. The
hypothesis is chosen by the sum of its cells' errors, each clipped, so that one broken cell cannot outweigh fifteen good
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from danceopd.worlds.scenes.grammar import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    GRID,
    IMAGE,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    cell_centres,
)
from danceopd.worlds.scenes.render import render

HYPOTHESES = tuple((style, background) for style in STYLES for background in BACKGROUNDS)
"""Every (style, background)."""
LOOKS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
"""Every (shape, colour); template 0 is the empty cell, template i + 1 is look i."""
CAP = 0.02
"""Mean squared error of a cell (colours in [0, 1]) beyond which it counts little more against a hypothesis."""
TAIL = 0.05
"""Weight of the error beyond the cap: it only decides between hypotheses that are all bad."""
BATCH = 64


@dataclass(frozen=True)
class Templates:
    """Templates of hypotheses that share their distinct rows: pixels (rows, H * 49, 768) and |pixels|^2."""

    hypotheses: tuple[int, ...]
    pixels: np.ndarray
    energy: np.ndarray


def cut(images: np.ndarray) -> np.ndarray:
    """Cells of uint8 images (N, 64, 64, 3) as float32 rows (N, 4, 4, 768), centred on zero, in [-0.5, 0.5]."""
    cells = images.reshape(-1, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, GRID, GRID, CELL * CELL * 3).astype(np.float32) / 255 - np.float32(0.5)


@lru_cache(maxsize=1)
def tables() -> tuple[Templates, ...]:
    """The cached templates: backgrounds that look alike in every row, then those that do not."""
    column = [place for place in cell_centres() if place[0] < CELL]
    groups: dict[int, list[tuple[int, np.ndarray]]] = {1: [], GRID: []}
    for index, (style, background) in enumerate(HYPOTHESES):
        pictures = [render(Scene((), background, style))]
        for shape, colour in LOOKS:
            things = tuple(Thing(shape, colour, x, y, SIZES["cells"][0]) for x, y in column)
            pictures.append(render(Scene(things, background, style)))
        cells = cut(np.stack(pictures))
        if not (cells[0] == cells[0][:, :1]).all():
            raise AssertionError(f"the columns of background {background!r} differ: the table keeps only one")
        rows = cells[:, :, 0].transpose(1, 0, 2)
        alike = bool((rows == rows[:1]).all())
        groups[1 if alike else GRID].append((index, rows[:1] if alike else rows))
    made = []
    for members in groups.values():
        if members:
            pixels = np.ascontiguousarray(np.concatenate([rows for _, rows in members], axis=1))
            made.append(Templates(tuple(i for i, _ in members), pixels, (pixels**2).sum(-1)))
    return tuple(made)


def _explain(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For uint8 images (N, 64, 64, 3): least error and best template of each cell and hypothesis, (N, 16, 20)."""
    cells = cut(images)
    number, width = len(cells), len(LOOKS) + 1
    error = np.empty((number, GRID * GRID, len(HYPOTHESES)), np.float32)
    best = np.empty(error.shape, np.int64)
    for table in tables():
        rows = len(table.pixels)
        # (rows, cells of such a row, 768): one product a distinct row.
        grouped = cells.reshape(1, -1, cells.shape[-1]) if rows == 1 else cells.transpose(1, 0, 2, 3)
        grouped = grouped.reshape(rows, -1, cells.shape[-1])
        distance = table.energy[:, None] - 2 * np.matmul(grouped, table.pixels.transpose(0, 2, 1))
        distance = distance.reshape(rows, -1, len(table.hypotheses), width)
        choice = distance.argmin(-1)
        least = np.take_along_axis(distance, choice[..., None], -1)[..., 0]
        least = (least + (grouped**2).sum(-1)[..., None]) / cells.shape[-1]
        where = np.array(table.hypotheses)
        for target, value in ((error, least), (best, choice)):
            if rows == 1:
                target[..., where] = value.reshape(number, GRID * GRID, -1)
            else:
                by_row = value.reshape(GRID, number, GRID, -1).transpose(1, 0, 2, 3)
                target[..., where] = by_row.reshape(number, GRID * GRID, -1)
    return np.maximum(error, 0), best


def read_cells(images: np.ndarray) -> list[Scene]:
    """The best explanation of each uint8 image (N, 64, 64, 3); things in reading order."""
    if images.shape[1:] != (IMAGE, IMAGE, 3):
        raise ValueError(f"images (N, {IMAGE}, {IMAGE}, 3) are needed, these are {images.shape}")
    centres, size = cell_centres(), SIZES["cells"][0]
    scenes = []
    for start in range(0, len(images), BATCH):
        error, best = _explain(images[start : start + BATCH])
        cost = (np.minimum(error, CAP) + TAIL * error).sum(1)
        for hypothesis, row in zip(cost.argmin(-1), best):
            style, background = HYPOTHESES[hypothesis]
            found = [(LOOKS[t - 1], centres[i]) for i, t in enumerate(row[:, hypothesis]) if t > 0]
            things = tuple(Thing(shape, colour, x, y, size) for (shape, colour), (x, y) in found)
            scenes.append(Scene(things, background, style))
    return scenes
