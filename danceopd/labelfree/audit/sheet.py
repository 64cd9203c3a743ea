"""A sheet of pictures: of some questions the best and the worst sample by each signal, framed by what is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from danceopd.run.plots import grid

SHOWN, SIDE, SMALLEST, FRAME = 8, 256, 128, 4
"""Questions on a sheet, the longest side of a picture, the height to which small ones are enlarged, a frame's width."""
RIGHT, WRONG, UNKNOWN = "#009e73", "#d55e00", "#999999"


@dataclass(frozen=True)
class Shown:
    """One answered question: its line of the audit, its source (None: no edit), and its samples in a `strip`."""

    line: Mapping[str, Any]
    source: Image.Image | None
    pictures: Image.Image

    @property
    def truth(self) -> Sequence[float]:
        """What each sample is worth; empty where nobody knows."""
        return self.line["truth"] or ()

    @property
    def differs(self) -> bool:
        """Whether samples are known to differ in worth."""
        return len(set(self.truth)) > 1

    def best_and_worst(self, signal: str) -> list[Image.Image | None]:
        """The first and the last sample by a signal, framed; nothing where it says nothing."""
        values = np.array(self.line["signals"].get(signal, [np.nan]), float)
        if not np.isfinite(values).all():
            return [None, None]
        return [self._framed(int(place), len(values)) for place in (values.argmax(), values.argmin())]

    def _framed(self, place: int, count: int) -> Image.Image:
        width = self.pictures.width // count
        sample = self.pictures.crop((place * width, 0, (place + 1) * width, self.pictures.height))
        colour = UNKNOWN if not self.truth else RIGHT if self.truth[place] >= 0.5 else WRONG
        return ImageOps.expand(sample, FRAME, colour)


def small(image: Image.Image) -> Image.Image:
    """At most `SIDE` pixels a side."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """The samples of one question, small and side by side; they are of one size."""
    parts = [small(picture) for picture in pictures]
    paper = Image.new("RGB", (parts[0].width * len(parts), parts[0].height))
    for place, picture in enumerate(parts):
        paper.paste(picture, (place * picture.width, 0))
    return paper


def sheet(questions: Sequence[Shown]) -> Image.Image:
    """Up to `SHOWN` questions, first those whose samples differ; frames are green where right, else orange."""
    chosen = sorted(questions, key=lambda one: not one.differs)[:SHOWN]
    names = list(dict.fromkeys(name for one in chosen for name in one.line["signals"]))
    edits = chosen[0].source is not None
    rows = [[*([q.source] if edits else []), *(p for n in names for p in q.best_and_worst(n))] for q in chosen]
    labels = [q.line["prompt"] + (f"; mean {np.mean(q.truth):.2f}" if q.truth else "") for q in chosen]
    heads = ["source"] if edits else []
    heads += [f"{name}: {which}" for name in names for which in ("best", "worst")]
    return grid(rows, labels, heads, scale=max(1, SMALLEST // chosen[0].pictures.height))
