"""Picture grids with captions: rows of small images as one image, for samples, the model card and the report.

`grid` lays pictures out in a table with a label per row and per column, enlarged by whole numbers without
smoothing so that every pixel of a small model stays visible, and captioned in Pillow's own font at a readable
size. An empty place (`None`) stays empty. Pictures of unequal size are centred in their column.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from danceopd.errors import UserError

PAPER, INK, RULE = (255, 255, 255), (28, 28, 32), (222, 222, 226)
FONT_SIZE = 13
GAP = 6
LABEL_WIDTH = 190
"""Row labels are wrapped to this many pixels."""


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, font) -> int:
    return int(font.getlength(text) + 0.999)


def _cut(word: str, width: int, font) -> list[str]:
    """A word in pieces no wider than `width`."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and _width(pieces[-1] + letter, font) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def wrap(text: str, width: int, size: int = FONT_SIZE) -> list[str]:
    """The text in lines that fit into `width` pixels; words too long for a line are cut."""
    font = _font(size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in (piece for w in paragraph.split() for piece in _cut(w, width, font)):
            longer = f"{line} {word}".strip()
            if line and _width(longer, font) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def _text(draw: ImageDraw.ImageDraw, x: int, y: int, lines: list[str], size: int) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * (size + 4)), line, fill=INK, font=_font(size))


def _block(lines: list[str], size: int) -> int:
    return len(lines) * (size + 4)


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    scale: int = 2,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """One RGB picture of all pictures, row by row, enlarged `scale` times.

    Rows may be of unequal length. Labels are wrapped, never cut off. Raises UserError for no picture at all,
    a scale below 1, or a number of labels that does not match.
    """
    columns = max((len(row) for row in rows), default=0)
    if not any(image is not None for row in rows for image in row):
        raise UserError("The picture grid has no picture in it; give at least one row with one image.")
    if scale < 1:
        raise UserError(f"A picture grid cannot be enlarged {scale} times; give a scale of 1 or more.")
    for labels, count, what in ((row_labels, len(rows), "row"), (column_labels, columns, "column")):
        if labels is not None and len(labels) != count:
            raise UserError(f"The picture grid has {count} {what}s and {len(labels)} {what} labels; give one for each.")
    filled = [list(row) + [None] * (columns - len(row)) for row in rows]
    widths = [max((i.width * scale for i in column if i is not None), default=64 * scale) for column in zip(*filled)]
    heads = [wrap(text, width, font_size) for text, width in zip(column_labels or [""] * columns, widths)]
    names = [wrap(text, LABEL_WIDTH, font_size) for text in row_labels or [""] * len(rows)]
    left = max((_width(line, _font(font_size)) for name in names for line in name), default=0)
    left = left + 2 * GAP if left else GAP
    top = GAP + (max(_block(h, font_size) for h in heads) if column_labels else 0)
    heights = [
        max([_block(name, font_size) if row_labels else 0] + [i.height * scale for i in row if i is not None])
        for row, name in zip(filled, names)
    ]

    paper = Image.new("RGB", (left + sum(w + GAP for w in widths), top + sum(h + GAP for h in heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    x = left
    for head, width in zip(heads, widths):
        _text(draw, x, GAP // 2, head if column_labels else [], font_size)
        x += width + GAP
    y = top
    for row, name, height in zip(filled, names, heights):
        if row_labels:
            _text(draw, GAP, y + max(0, (height - _block(name, font_size)) // 2), name, font_size)
        x = left
        for image, width in zip(row, widths):
            if image is not None:
                big = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
                paper.paste(big, (x + (width - big.width) // 2, y + (height - big.height) // 2))
            x += width + GAP
        y += height + GAP
    return paper


HUES = ((28, 28, 32), (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
        (130, 130, 130))  # fmt: skip
"""The mean's, then the teachers': Okabe and Ito's, which stay apart for readers who confuse colours, and a grey."""


CAPTION = "step; velocity error on held-out prompts (log scale): lower is nearer to the teachers"


WIDTH, HEIGHT, SCALE = 560, 300, 2


LEFT, RIGHT, TOP, BOTTOM = 48, 20, 34, 38
LEGEND = 17
"""The middle of the first row of names."""


def curves(
    steps: Sequence[int], lines: Mapping[str, Sequence[float]], chosen: int | None = None, caption: str = CAPTION,
    log: bool = True,
) -> bytes:  # fmt: skip
    """A PNG of `lines` by name over `steps`; `chosen` is marked by a ring.

    With `log` on a scale of powers of ten, on which numbers that are not above 0 have no place and break their line.
    """
    font = ImageFont.load_default(12 * SCALE)
    places_of_names = _legend(list(lines), font)
    top = TOP + places_of_names[-1][1] - LEGEND if lines else TOP  # more than a row of names needs its own room
    tall = HEIGHT + top - TOP
    picture = Image.new("RGB", (WIDTH * SCALE, tall * SCALE), PAPER)
    draw = ImageDraw.Draw(picture)

    def has_place(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    shown = [value for line in lines.values() for value in line if has_place(value)]
    ticks = _powers(shown) if log else _even(shown)
    low, high = (math.log10(end) if log else end for end in (ticks[0], ticks[-1]))
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        down = top + (tall - top - BOTTOM) * (high - (math.log10(value) if log else value)) / (high - low)
        return across * SCALE, down * SCALE

    for value in ticks:
        draw.line([at(first, value), at(last, value)], fill=RULE, width=SCALE)
        draw.text((at(first, value)[0] - 6 * SCALE, at(first, value)[1]), f"{value:g}", INK, font, "rm")
    for step in sorted({first, *steps[:: max(1, -(-len(steps) // 6))]} if len(steps) > 1 else {first}):
        draw.text((at(step, 1)[0], (tall - BOTTOM + 6) * SCALE), str(step), INK, font, "mt")
    draw.text(((WIDTH + LEFT) * SCALE / 2, (tall - 4) * SCALE), caption, INK, font, "mb")
    for number, (name, line) in enumerate(lines.items()):
        hue = HUES[0] if number == 0 else HUES[1 + (number - 1) % (len(HUES) - 1)]
        places = [at(step, value) if has_place(value) else None for step, value in zip(steps, line, strict=True)]
        for a, b in zip(places, places[1:]):
            if a is not None and b is not None:
                draw.line([a, b], fill=hue, width=(3 if number == 0 else 2) * SCALE)
        for place in places:
            if place is not None:
                _dot(draw, place, 3, hue)
        if number == 0 and (ring := dict(zip(steps, places)).get(-1 if chosen is None else chosen)) is not None:
            draw.circle(ring, 7 * SCALE, outline=hue, width=SCALE)
        across, down = (SCALE * pixels for pixels in places_of_names[number])
        _dot(draw, (across + 4 * SCALE, down), 4, hue)
        draw.text((across + 12 * SCALE, down), name, INK, font, "lm")
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _legend(names: Sequence[str], font: Any) -> list[tuple[int, int]]:
    """Where each name stands, in rows that fit the width: (across, down) before `SCALE`."""
    found, across, down = [], LEFT, LEGEND
    for name in names:
        width = int(font.getlength(name)) // SCALE + 32
        if across + width - 20 > WIDTH and across > LEFT:
            across, down = LEFT, down + 18
        found.append((across, down))
        across += width
    return found


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values, with twice and five times each where there are few."""
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    factors = (1, 2, 5) if high - low < 3 else (1,)
    return [factor * 10.0**power for power in range(low, high) for factor in factors] + [10.0**high]


def _even(values: Sequence[float]) -> list[float]:
    """Four to eight even ticks around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    width = max(high - low, 1e-6)
    unit = 10.0 ** math.floor(math.log10(width))
    step = next(unit * factor for factor in (0.2, 0.5, 1, 2) if width / (unit * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * k, 10) for k in range(first, max(last, first + 1) + 1)]


def _dot(draw: ImageDraw.ImageDraw, place: tuple[float, float], radius: int, hue: tuple[int, int, int]) -> None:
    draw.circle(place, radius * SCALE, fill=hue)
