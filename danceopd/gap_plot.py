"""The course of the field gap as a picture: a curve for each teacher, their mean, and the step that is exported."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, RULE = (255, 255, 255), (28, 28, 32), (222, 222, 226)
HUES = ((28, 28, 32), (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""The mean's, then the teachers': Okabe and Ito's, which stay apart for readers who confuse colours."""
CAPTION = "step; the gap to the teachers on held-out work, where 0 is the teachers"
WIDTH, HEIGHT, SCALE = 560, 300, 2
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 34, 38


def curves(steps: Sequence[int], lines: Mapping[str, Sequence[float]], chosen: int | None = None) -> bytes:
    """A PNG of `lines` by name over `steps`, on a scale of powers of ten; `chosen` is marked by a ring.

    Numbers that are not above 0 have no place on it and break their line.
    """
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12 * SCALE)
    shown = [value for line in lines.values() for value in line if _placed(value)]
    low = math.floor(math.log10(min(shown, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(shown, default=1.0))))
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)
        return across * SCALE, down * SCALE

    for power in range(low, high + 1):
        for factor in (1, 2, 5) if high - low < 3 and power < high else (1,):
            value = factor * 10.0**power
            draw.line([at(first, value), at(last, value)], fill=RULE, width=SCALE)
            draw.text((at(first, value)[0] - 6 * SCALE, at(first, value)[1]), f"{value:g}", INK, font, "rm")
    for step in sorted({first, *steps[:: max(1, -(-len(steps) // 6))]} if len(steps) > 1 else {first}):
        draw.text((at(step, 1)[0], (HEIGHT - BOTTOM + 6) * SCALE), str(step), INK, font, "mt")
    draw.text(((WIDTH + LEFT) * SCALE / 2, (HEIGHT - 4) * SCALE), CAPTION, INK, font, "mb")
    across = LEFT * SCALE
    for number, (name, line) in enumerate(lines.items()):
        hue = HUES[0] if number == 0 else HUES[1 + (number - 1) % (len(HUES) - 1)]
        places = [at(step, value) if _placed(value) else None for step, value in zip(steps, line, strict=True)]
        for a, b in zip(places, places[1:]):
            if a is not None and b is not None:
                draw.line([a, b], fill=hue, width=(3 if number == 0 else 2) * SCALE)
        for place in places:
            if place is not None:
                _dot(draw, place, 3, hue)
        if number == 0 and (ring := dict(zip(steps, places)).get(-1 if chosen is None else chosen)) is not None:
            draw.circle(ring, 7 * SCALE, outline=hue, width=SCALE)
        _dot(draw, (across + 4 * SCALE, 17 * SCALE), 4, hue)
        draw.text((across + 12 * SCALE, 17 * SCALE), name, INK, font, "lm")
        across += int(font.getlength(name)) + 32 * SCALE
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _placed(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _dot(draw: ImageDraw.ImageDraw, place: tuple[float, float], radius: int, hue: tuple[int, int, int]) -> None:
    draw.circle(place, radius * SCALE, fill=hue)
