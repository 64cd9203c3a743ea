"""`Reader`: a picture goes in, the scene comes out: which drawing is where, its colour, the background and the style.

Analysis by synthesis. The background that explains most of the picture is taken (a smooth drift from it is allowed);
what differs from it is foreground. Things that should not have moved are searched for in their places; every other part
of the foreground is boxed and classified. Classification compares outlines with every class (`edges`), so a drawing may
be shifted, scaled and redrawn within limits (`SHIFT`, `SCALES`, `ALIKE_ENOUGH`); its colour is the closest colour word.
Then the scene is rendered in each possible style: the closest style is taken, and the difference that is left is
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from danceopd.worlds.openmoji.colours import colour_word
from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.edges import mirrored, orientations, windows
from danceopd.worlds.openmoji.kinds import BACKGROUNDS, COLOURLESS, COLOURS, LINES, PLAIN, STYLES
from danceopd.worlds.openmoji.render import (
    as_array,
    blocks,
    box_mean,
    compose,
    connected_parts,
    cover,
    ground,
    put,
    shrunk,
    widest,
)
from danceopd.worlds.openmoji.tasks import SIZES
from danceopd.worlds.scenes.grammar import IMAGE, Scene, Thing

SIDE = 256
"""Pixels a side at which a picture is read, whatever its own size."""
UNIT = SIDE // IMAGE
SHIFT = 2.5
"""A thing is still in its place when it moved by at most this many of the 64 units (4 % of the picture) on an axis."""
AROUND = np.arange(-6, 6.1, 1.5)
"""Offsets at which a thing is also searched for, to tell whether it moved."""
SCALES = (0.82, 0.9, 1.0, 1.1, 1.22)
"""Sizes at which a thing is searched for in its place; a drawing beyond them has changed its size."""
ALIKE_ENOUGH = 0.5
"""Cosine of two outlines' descriptors from which a drawing counts as one of its class, if no class is more similar."""
OTHER = "other"
"""A background that is none of the known ones; the style of a picture that shows no known drawing."""
UNKNOWN = "something"
"""The class of a thing that resembles no drawing."""
UNCLEAR = "unclear"
"""The colour of such a thing."""
FOREGROUND = 0.1
"""Difference from the ground, of colours in [0, 1], from which a pixel belongs to a thing."""
DRIFT = 0.25
"""How far a ground may drift smoothly from the known one, of colours in [0, 1]."""
EDGE = 3
"""How far an edge or a star of the ground may lie from its place, in pixels of 256."""
STRAY = 0.25
"""Difference from the rendered scene from which a pixel outside all things is unexplained."""
ENOUGH = 0.006
"""Mean difference, of colours in [0, 1], around a rendered thing at which its place needs no further search."""
SURE = 2e-4
"""Mean squared difference from the picture at which a style is taken without trying the others (37 dB)."""
WORSE = 1.15
"""A rendered thing that differs this many times as much as the empty ground is dropped (half-transparent ones pass)."""
MARGIN = 1.12
"""Half the side of a window, as a multiple of half a thing's side."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    ``scene`` is its best explanation, with things moved to the expected places where they lie within the limits;
    ``found`` the same things as they were measured. ``psnr`` (dB) compares the rendered scene with the picture at 128
    pixels; ``unexplained`` is the share of pixels that neither a thing nor the ground explains;
    ``likeness`` the cosine of each thing's outline with its class; ``picture`` (128, 128, 3) float32 in [0, 1].
    """

    scene: Scene
    found: tuple[Thing, ...]
    psnr: float
    unexplained: float
    likeness: tuple[float, ...]
    picture: np.ndarray


@dataclass(frozen=True)
class _Candidate:
    """Windows (k,) over one place: centres, sizes, descriptors (and mirrored ones), and the thing expected there.

    ``cosines`` (k, classes) by kind of line work are computed when they are needed.
    """

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    seen: tuple[np.ndarray, ...]
    known: Thing | None
    cosines: dict[str, np.ndarray] = field(default_factory=dict)


def _kind(style: str) -> str:
    """The style whose templates are used: styles with similar outlines share them."""
    return "line drawing" if style in LINES else style if style in ("no outlines", "pixel art") else PLAIN


class Reader:
    """Reads pictures of the drawings of one folder; templates are made on first use and kept."""

    def __init__(self, drawings: Drawings):
        self.drawings = drawings
        self.names = tuple(drawings.kinds)
        self._templates: dict[str, np.ndarray] = {}

    def read(
        self,
        image: Image.Image | np.ndarray,
        still: Sequence[Thing] = (),
        about: Sequence[Thing] = (),
        style: str = PLAIN,
    ) -> Reading:
        """Read a picture of any size.

        ``still`` are things that are searched for in their places first, ``about`` places where something may have come
        or gone; ``style`` is preferred among styles that explain the picture equally well.
        """
        picture = as_array(image, SIDE)
        options, empty, away = self._ground(picture)
        apart = away > FOREGROUND
        cells = shrunk(apart.astype(np.float32), UNIT) > 0.12
        near = np.repeat(np.repeat(widest(cells, 1), UNIT, 0), UNIT, 1)
        integral = orientations(picture, near.astype(np.float32))
        candidates = self._candidates(integral, cells, apart, {_kind(style), PLAIN}, still)
        best: tuple[float, str, str, list[tuple[Thing, Thing, float]], np.ndarray] | None = None
        options = sorted(options, key=lambda option: (option[0] != style, option[0] != PLAIN))
        for option, background in options:
            things = self._things(picture, empty, option, candidates, (*still, *about))
            again = self._again(empty, [found for found, _, _ in things], option)
            if option == "pixel art":
                again = _gridded(again, picture)
            error = shrunk(picture - again, 2)
            cost = float(np.minimum((error**2).sum(-1), 0.1).mean())
            if best is None or cost < 0.95 * best[0] - 1e-5:
                best = (cost, option, background, things, error)
            if best[0] < SURE:
                break
        assert best is not None
        _, option, background, things, error = best
        return self._reading(shrunk(picture, 2), option, background, things, error)

    def _reading(self, picture, style, background, things, error) -> Reading:
        stray = np.abs(error).max(-1) > STRAY
        known = tuple(found for found, _, _ in things if found.shape != UNKNOWN)
        stray &= ~cover(known, self.drawings, SIDE // 2, 1.0)
        style = style if known else OTHER
        things = sorted(things, key=lambda part: (part[1].y, part[1].x))
        return Reading(
            Scene(tuple(seen for _, seen, _ in things), background, style),
            tuple(found for found, _, _ in things),
            float(-10 * np.log10(max(float((error**2).mean()), 1e-10))),
            float(stray.mean()),
            tuple(round(likeness, 4) for _, _, likeness in things),
            picture,
        )

    def _ground(self, picture: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
        """The (style, background) pairs whose empty picture explains most, that picture with its drift, and distances.

        The distance of each pixel from that picture is (SIDE, SIDE).
        """
        small = shrunk(picture, UNIT)
        pairs, empties = _empties()
        costs = _cost(small, empties)
        first = int(costs.argmin())
        border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])
        plain = np.broadcast_to(np.median(border, 0), small.shape).astype(np.float32)
        if _cost(small, plain) < 0.6 * costs[first] - 0.01:
            options, base = [(s, OTHER) for s in (PLAIN, "no outlines", "pixel art")], plain
            full = low = high = np.broadcast_to(plain[0, 0], picture.shape)
        else:
            same = np.abs(empties - empties[first]).mean((1, 2, 3)) < 0.01
            options = [pair for pair, alike in zip(pairs, same) if alike]
            base, full = empties[first], ground(pairs[first][1], pairs[first][0], SIDE)
            low, high = _range(*pairs[first])
        drift = small - base
        calm = (np.abs(drift).max(-1, keepdims=True) < DRIFT).astype(np.float32)
        weight = box_mean(calm)
        drift = np.where(weight > 0.1, box_mean(drift * calm) / np.maximum(weight, 1e-6), 0).astype(np.float32)
        planes = [Image.fromarray(plane) for plane in np.moveaxis(drift, -1, 0)]
        smooth = np.stack([np.asarray(plane.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for plane in planes], -1)
        calmed = np.repeat(np.repeat(shrunk(picture, 2), 2, 0), 2, 1)  # noise is no foreground
        away = np.maximum(calmed - high - smooth, low + smooth - calmed).max(-1)
        return options, full + smooth, away

    def _candidates(self, integral, cells, apart, kinds: set[str], still: Sequence[Thing]) -> list[_Candidate]:
        """Windows over the places of ``still``, then over each part of the foreground that is left."""
        left = cells.copy()
        candidates = []
        steps = np.arange(-SHIFT, SHIFT + 0.1, 0.5)
        for thing in still:
            box = _box(thing.x, thing.y, thing.size)
            if cells[box].mean() < 0.05:
                continue
            candidate = self._candidate(integral, thing.x, thing.y, thing.size, steps, np.array(SCALES), thing)
            number = self.names.index(thing.shape)
            far = self._candidate(integral, thing.x, thing.y, thing.size, AROUND, np.array((0.9, 1.0, 1.1)), thing)
            away = np.maximum(np.abs(far.x - thing.x), np.abs(far.y - thing.y)) > SHIFT
            here = max(float(self._cosines(candidate, kind)[:, number].max()) for kind in kinds)
            there = max(float(self._cosines(far, kind)[away, number].max()) for kind in kinds)
            if there > here:
                continue  # it moved: what is left of it is found below
            candidates.append(candidate)
            left[_box(thing.x, thing.y, thing.size + 2)] = False
        steps, scales = np.arange(-1, 1.1, 0.5), np.array((0.82, 0.88, 0.94, 1, 1.06))
        for part in connected_parts(left):
            if part.sum() < 8:
                continue
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            cut = (slice(rows[0] * UNIT, (rows[-1] + 1) * UNIT), slice(columns[0] * UNIT, (columns[-1] + 1) * UNIT))
            rows, columns = np.flatnonzero(apart[cut].any(1)), np.flatnonzero(apart[cut].any(0))
            x = (cut[1].start + (columns[0] + columns[-1] + 1) / 2) / UNIT
            y = (cut[0].start + (rows[0] + rows[-1] + 1) / 2) / UNIT
            size = max(rows[-1] - rows[0], columns[-1] - columns[0]) / 2 / UNIT
            if size >= 2:
                candidates.append(self._candidate(integral, x, y, size, steps, scales, None))
        return candidates

    def _candidate(self, integral, x, y, size, steps, scales, known) -> _Candidate:
        dx, dy, scale = (grid.ravel() for grid in np.meshgrid(steps, steps, scales))
        xs, ys, sizes = x + dx, y + dy, size * scale
        seen = windows(integral, np.stack([xs, ys], 1) * UNIT, sizes * MARGIN * UNIT)
        # A new dog may look to the other side.
        return _Candidate(xs, ys, sizes, (seen, mirrored(seen)) if known is None else (seen,), known)

    def _cosines(self, candidate: _Candidate, kind: str) -> np.ndarray:
        if kind not in candidate.cosines:
            candidate.cosines[kind] = np.maximum.reduce([self._likeness(seen, kind) for seen in candidate.seen])
        return candidate.cosines[kind]

    def _likeness(self, seen: np.ndarray, kind: str) -> np.ndarray:
        """Cosines (k, classes) of window descriptors with the likest template of every class."""
        if kind not in self._templates:
            self._templates[kind] = self._made(kind)
        templates = self._templates[kind]
        return (seen @ templates.reshape(-1, templates.shape[-1]).T).reshape(len(seen), len(self.names), -1).max(-1)

    def _made(self, kind: str) -> np.ndarray:
        """Templates (classes, looks, length) of a kind of line work: both sizes, and three bodies where they show."""
        colours = ("white",) if kind == "line drawing" else ("white", "blue", "black")
        looks = [(colour, size) for colour in colours for size in SIZES]
        background = "pink" if kind == "no outlines" else "white"  # a white body has to be seen
        made = np.zeros((len(self.names), len(looks), 0), np.float32)
        for number, (colour, size) in enumerate(looks):
            # Four drawings share a picture, far enough apart for their windows.
            for start in range(0, len(self.names), 4):
                things = [
                    Thing(name, colour, 16.0 + 32 * (i % 2), 16.0 + 32 * (i // 2), size)
                    for i, name in enumerate(self.names[start : start + 4])
                ]
                picture = compose(Scene(tuple(things), background, kind), self.drawings, SIDE)
                centres = np.array([(t.x, t.y) for t in things]) * UNIT
                found = windows(orientations(picture), centres, np.full(len(things), size * MARGIN * UNIT))
                if made.shape[-1] == 0:
                    made = np.zeros((len(self.names), len(looks), found.shape[-1]), np.float32)
                made[start : start + len(things), number] = found
        return made

    def _things(self, picture, empty, style, candidates, known) -> list[tuple[Thing, Thing, float]]:
        """(as measured, as reported, likeness) of every thing under a style."""
        out = []
        for candidate in candidates:
            cosines = self._cosines(candidate, _kind(style))
            at, number = np.unravel_index(cosines.argmax(), cosines.shape)
            likeness = float(cosines[at, number])
            x, y, size = float(candidate.x[at]), float(candidate.y[at]), float(candidate.size[at])
            if likeness < ALIKE_ENOUGH:
                there = Thing(UNKNOWN, UNCLEAR, x, y, size)
                out.append((there, _snapped(there, candidate.known, known), likeness))
                continue
            found = Thing(self.names[number], "white", x, y, size)
            found = self._placed(picture, empty, style, found, _snapped(found, candidate.known, known))
            out.append((found, _snapped(found, candidate.known, known), likeness))
        if style not in COLOURLESS:
            return out
        # A colour that a style hides counts as the one that was there.
        were = {(t.x, t.y): t.colour for t in known}
        return [
            (f, r if r.shape == UNKNOWN else replace(r, colour=were.get((r.x, r.y), "white")), likeness)
            for f, r, likeness in out
        ]

    def _placed(self, picture, empty, style, found: Thing, reported: Thing) -> Thing:
        """The place and colour of a thing that come nearest to the picture when it is drawn there."""

        reach = found.size + SHIFT + 1.5
        ends = [(max(int(at - reach), 0), min(max(int(at + reach) + 1, 1), IMAGE)) for at in (found.y, found.x)]
        rows, columns = (slice(low * UNIT, high * UNIT) for low, high in ends)
        there, bare = picture[rows, columns], empty[rows, columns]

        def error(thing: Thing) -> float:
            again = bare.copy()
            if thing.shape != UNKNOWN:
                put(again, thing, self.drawings, style, SIDE, (rows.start, columns.start))
            again = blocks(again, UNIT) if style == "pixel art" else again
            return float(np.abs(there - again).sum()) / there.size

        def coloured(thing: Thing) -> Thing:
            if style in ("pixel art", "grayscale"):  # blocks mix a thin body with its outline, and gray has no word
                return min((replace(thing, colour=word) for word in COLOURS), key=error)
            return replace(thing, colour=self._colour(picture, style, thing))

        best = coloured(replace(reported, shape=found.shape))
        least = error(best)
        x, y = round(found.x * UNIT) / UNIT, round(found.y * UNIT) / UNIT
        for size in dict.fromkeys([*(s for s in SIZES if abs(s / found.size - 1) < 0.15), found.size]):
            if least < ENOUGH:
                break
            near = coloured(replace(found, x=x, y=y, size=size))
            for dy, dx in np.ndindex(5, 5):
                thing = replace(near, x=x + (dx - 2) / UNIT, y=y + (dy - 2) / UNIT)
                cost = error(thing)
                if cost < least:
                    best, least = thing, cost
        if least > WORSE * error(replace(best, shape=UNKNOWN)):
            return replace(best, shape=UNKNOWN, colour=UNCLEAR)
        return coloured(best)

    def _colour(self, picture: np.ndarray, style: str, thing: Thing) -> str:
        """The colour word of a thing's body where it lies; "white" where nothing of it is in the picture."""
        wide = max(round(2 * thing.size * UNIT), 8)
        body = self.drawings.body(thing.shape, wide)
        mask = body > min(0.8, float(np.quantile(body, 0.97)))
        rows, columns = np.nonzero(mask)
        rows = rows + round((thing.y - thing.size) * UNIT)
        columns = columns + round((thing.x - thing.size) * UNIT)
        inside = (rows >= 0) & (rows < SIDE) & (columns >= 0) & (columns < SIDE)
        if not inside.any():
            return "white"
        colour = np.median(picture[rows[inside], columns[inside]], 0)
        return colour_word(1 - colour if style == "negative" else colour)

    def _again(self, empty: np.ndarray, things: Sequence[Thing], style: str) -> np.ndarray:
        """The ground with things drawn into it, (SIDE, SIDE, 3)."""
        picture = np.array(empty, np.float32)
        for thing in things:
            if thing.shape != UNKNOWN:
                put(picture, thing, self.drawings, style)
        return picture


def _gridded(again: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A picture as blocks, on the grid that brings it nearest to another: a grid may be shifted."""
    found = []
    for shift in np.ndindex(UNIT, UNIT):
        grid = np.roll(blocks(np.roll(again, shift, (0, 1)), UNIT), [-by for by in shift], (0, 1))
        found.append((float(np.abs(grid - picture).mean()), shift, grid))
    return min(found, key=lambda one: one[:2])[2]


@lru_cache(maxsize=1)
def _empties() -> tuple[list[tuple[str, str]], np.ndarray]:
    """All (style, background) pairs that look different, and their empty pictures (k, 64, 64, 3)."""
    pairs = [(s, b) for s in STYLES for b in BACKGROUNDS if s not in LINES or b == "white"]  # lines hide the background
    return pairs, np.stack([shrunk(ground(b, s, SIDE), UNIT) for s, b in pairs])


@lru_cache(maxsize=32)
def _range(style: str, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value (n, n, 3) within ``EDGE`` pixels of an empty picture: a horizon may lie elsewhere."""
    empty = ground(background, style, SIDE)
    return -widest(-empty, EDGE), widest(empty, EDGE)


def _cost(small: np.ndarray, empties: np.ndarray) -> np.ndarray:
    """Mean clipped difference of (64, 64, 3) from (..., 64, 64, 3)."""
    return np.minimum(np.abs(small - empties).max(-1), 0.3).mean((-1, -2))


def _box(x: float, y: float, reach: float) -> tuple[slice, slice]:
    """The cells of 64 that a square covers."""
    return tuple(slice(max(int(at - reach), 0), max(int(np.ceil(at + reach)), 0)) for at in (y, x))  # type: ignore[return-value]


def _snapped(thing: Thing, claimed: Thing | None, known: Sequence[Thing]) -> Thing:
    """The thing moved to the expected place, and to its size, where both are within the limits."""
    near = claimed
    if near is None:
        near = min(known, key=lambda t: max(abs(t.x - thing.x), abs(t.y - thing.y)), default=None)
    if near is None or max(abs(near.x - thing.x), abs(near.y - thing.y)) > max(near.size / 2, SHIFT + 0.5):
        return thing
    alike = 0.75 <= thing.size / near.size <= 1.33
    return replace(thing, x=near.x, y=near.y, size=near.size if alike else thing.size)
