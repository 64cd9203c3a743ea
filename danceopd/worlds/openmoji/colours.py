"""`colour_word`: an RGB colour goes in, the closest of GenEval's ten colour words in CIELAB comes out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from danceopd.worlds.openmoji.kinds import ALIKE, COLOURS, rgb


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB colours (..., 3) in [0, 1]."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    white = linear @ np.array(matrix).T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(white > 216 / 24389, np.cbrt(white), (24389 / 27 * white + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@lru_cache(maxsize=1)
def _inks() -> tuple[tuple[str, ...], np.ndarray]:
    """Colour words and the CIELAB of what they name, a row each."""
    rows = [(word, rgb(fill)) for word in COLOURS for fill in (COLOURS[word][0], *ALIKE[word])]
    return tuple(word for word, _ in rows), _lab(np.array([fill for _, fill in rows]) / 255)


def colour_word(colour: np.ndarray) -> str:
    """The colour word nearest in CIELAB to a colour (3,) in [0, 1]."""
    words, labs = _inks()
    return words[int(((labs - _lab(colour)) ** 2).sum(-1).argmin())]
