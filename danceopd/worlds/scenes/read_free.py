"""Read images of the ``free`` tier: slide every shape, size and colour over the image, under each style and background.

A style is an affine map of the colours, so it is undone first. How much of the residual against the ground (the empty
background) a thing at a place would explain is then a correlation, computed for all places by one Fourier transform.
Things never overlap, so the gains do not depend on each other: take the largest, strike out what overlaps it, and go
on while a thing explains more than the empty ground. The few most likely grounds are tried; the explanation
with the least (clipped) residual wins.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from danceopd.worlds.scenes.grammar import BACKGROUNDS, COLOURS, IMAGE, SHAPES, SIZES, STYLES, Scene, Thing
from danceopd.worlds.scenes.render import PALETTE, coverage, render, tint

HYPOTHESES = tuple((style, background) for style in STYLES for background in BACKGROUNDS)
TRIED = 6
"""How many of the 20 hypotheses are searched for things, most likely ground first."""
ENOUGH = 0.001
"""Mean clipped squared error (about 30 dB) at which an explanation is taken without trying the next."""
COMPARED = 3
"""How many hypotheses must be tried before one that is twice as good as the others is taken."""
CLIP = 0.06
"""Squared colour distance of a pixel (colours in [0, 1], summed over channels) at which it is clipped."""
LIMIT = 8
"""Most things that a reading may hold."""

_FORMS = tuple((shape, size) for shape in SHAPES for size in SIZES["free"])
_INKS = np.array([PALETTE[c] for c in COLOURS], np.float32) / 255


@lru_cache(maxsize=1)
def _grounds() -> np.ndarray:
    """The 20 empty pictures: (20, 64, 64, 3) float32 in [0, 1]."""
    pictures = [render(Scene((), background, style)) for style, background in HYPOTHESES]
    return np.stack(pictures).astype(np.float32) / 255


@lru_cache(maxsize=len(STYLES))
def _affine(style: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (3,) of a style's colour map, colours in [0, 1]."""
    offset = tint(np.zeros((1, 3), np.float32), style)[0]
    scale = tint(np.ones((1, 3), np.float32), style)[0] - offset
    return scale, offset / 255


@lru_cache(maxsize=2)
def _spectra(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Conjugate spectra (12, 64, 33) of every form's coverage and of its square, centred on pixel (0, 0)."""
    middle = IMAGE // 2
    forms = np.stack([coverage(shape, middle, middle, size, kind) for shape, size in _FORMS])
    forms = np.roll(forms, (-middle, -middle), axis=(1, 2))
    return np.conj(np.fft.rfft2(forms)), np.conj(np.fft.rfft2(forms**2))


def _correlate(spectra: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Sum of form x field at every place: forms (F, 64, 33), fields (K, 64, 64) -> (F, K, 64, 64)."""
    product = spectra[:, None] * np.fft.rfft2(fields)[None]
    return np.fft.irfft2(product, s=(IMAGE, IMAGE)).astype(np.float32)


@lru_cache(maxsize=len(HYPOTHESES))
def _cost(hypothesis: int) -> np.ndarray:
    """Sum of coverage^2 |ink - ground|^2 for each form, ink and place: (12, 8, 64, 64); inf outside the picture."""
    style, _ = HYPOTHESES[hypothesis]
    scale, offset = _affine(style)
    ground = ((_grounds()[hypothesis] - offset) / scale).transpose(2, 0, 1)
    fields = np.concatenate([np.ones((1, IMAGE, IMAGE), np.float32), ground, (ground**2).sum(0)[None]])
    sums = _correlate(_spectra("outline" if style == "outline" else "flat")[1], fields)
    cost = (_INKS**2).sum(1)[:, None, None] * sums[:, :1]
    cost = cost - 2 * np.einsum("kc,fcyx->fkyx", _INKS, sums[:, 1:4]) + sums[:, 4:]
    place = np.arange(IMAGE)
    for row, (_, size) in zip(cost, _FORMS):
        outside = (place < size + 1) | (place > IMAGE - size - 1)
        row[:, outside] = np.inf
        row[:, :, outside] = np.inf
    return cost


def _things(image: np.ndarray, hypothesis: int) -> tuple[Thing, ...]:
    """The things that explain an image (64, 64, 3) in [0, 1] under a hypothesis, in reading order."""
    style, _ = HYPOTHESES[hypothesis]
    scale, offset = _affine(style)
    ground = (_grounds()[hypothesis] - offset) / scale
    residual = (image - offset) / scale - ground
    fields = np.concatenate([residual, (residual * ground).sum(-1, keepdims=True)], axis=-1).transpose(
        2, 0, 1
    )
    sums = _correlate(_spectra("outline" if style == "outline" else "flat")[0], fields)
    gain = 2 * (np.einsum("kc,fcyx->fkyx", _INKS, sums[:, :3]) - sums[:, 3:]) - _cost(hypothesis)
    best, ink = gain.max(1), gain.argmax(1)
    found: list[Thing] = []
    place = np.arange(IMAGE)
    while len(found) < LIMIT:
        form, y, x = np.unravel_index(best.argmax(), best.shape)
        if best[form, y, x] <= 0:
            break
        shape, size = _FORMS[form]
        found.append(Thing(shape, COLOURS[ink[form, y, x]], float(x), float(y), size))
        for other, (_, reach) in enumerate(_FORMS):
            near_x = np.abs(place - x) < size + reach
            near_y = np.abs(place - y) < size + reach
            best[other][np.ix_(near_y, near_x)] = -np.inf
    return tuple(sorted(found, key=lambda t: (t.y, t.x)))


def _clipped_error(image: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Mean clipped squared error over the pixels: (..., 64, 64, 3) -> (...)."""
    error = ((image - picture) ** 2).sum(-1)
    return (np.minimum(error, CLIP) + 0.05 * error).mean((-1, -2))


def read_free(image: np.ndarray) -> Scene:
    """The best explanation of one uint8 image (64, 64, 3)."""
    if image.shape != (IMAGE, IMAGE, 3):
        raise ValueError(f"an image ({IMAGE}, {IMAGE}, 3) is needed, this is {image.shape}")
    colours = image.astype(np.float32) / 255
    best, errors = None, [np.inf]
    for hypothesis in np.argsort(_clipped_error(colours, _grounds()), kind="stable")[:TRIED]:
        style, background = HYPOTHESES[hypothesis]
        scene = Scene(_things(colours, int(hypothesis)), background, style)
        error = float(_clipped_error(colours, render(scene).astype(np.float32) / 255))
        if error < min(errors):
            best = scene
        errors.append(error)
        least, second = sorted(errors)[:2]
        if least < ENOUGH or (len(errors) > COMPARED and least < second / 2):
            break
    assert best is not None
    return best
