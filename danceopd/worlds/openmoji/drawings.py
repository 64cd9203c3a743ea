"""`Drawings`: a folder of OpenMoji SVGs goes in, rasters of any size and body colour come out, with or without lines.

A drawing is an SVG of 72 x 72 whose top groups are layers (`color…`, `hair`, `skin…`, `line…`). A layer whose name
begins with `line` is line work, every other is colour. The raster is cropped to the drawing's outline: its longer side
has the requested length, so that a thing's size is the size that is seen. Needs `resvg-py` (extra `openmoji`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from danceopd.errors import UserError
from danceopd.worlds.openmoji.kinds import COLOURS, KINDS, Kind

SVG = "http://www.w3.org/2000/svg"
SPACE = 72.0
"""Side of an SVG in its own units."""
FINE = 8
"""Pixels per unit when a drawing's outline is measured."""
MASK_FILL, OTHER_FILL = "#ffffff", "#000000"

ElementTree.register_namespace("", SVG)


class Sprite(NamedTuple):
    """A drawing of side n: colours (n, n, 3) and opacity (n, n), both float32 in [0, 1], colours not premultiplied."""

    colour: np.ndarray
    alpha: np.ndarray


class Drawings:
    """The drawings below ``folder`` (``color/svg/<file>.svg``); UserError when one is missing or is no SVG."""

    def __init__(self, folder: Path, kinds: Sequence[Kind] = KINDS):
        self.folder, self.kinds = folder, {kind.name: kind for kind in kinds}
        self._trees = {kind.name: self._parsed(kind) for kind in kinds}
        # Bound to the instance, so that two folders never share rasters.
        self.sprite = lru_cache(maxsize=2048)(self._sprite)
        self.body = lru_cache(maxsize=512)(self._body)

    def _parsed(self, kind: Kind) -> ElementTree.Element:
        path = self.folder / "color" / "svg" / f"{kind.file}.svg"
        try:
            root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
            raise UserError(
                f"the drawing of {kind.name}, {path}, cannot be read ({error}); run `danceopd openmoji fetch` again"
            ) from None
        layers = [child.get("id", "") for child in root]
        if "color" not in layers or not any(name.startswith("line") for name in layers):
            raise UserError(f"the drawing of {kind.name}, {path}, has no layers color and line; fetch it again")
        if kind.body not in {_hex(e.get("fill")) for e in root.iter()}:
            raise UserError(f"the drawing of {kind.name}, {path}, has no fill {kind.body}; fetch it again")
        return root

    @cached_property
    def boxes(self) -> dict[str, tuple[float, float, float]]:
        """Name -> centre (x, y) and half the longer side of what is drawn, in the drawing's own coordinates."""
        found = {}
        for name, root in self._trees.items():
            alpha = _raster(root, 0.0, 0.0, SPACE, round(SPACE * FINE))[..., 3] > 0.5
            rows, columns = np.flatnonzero(alpha.any(1)) / FINE, np.flatnonzero(alpha.any(0)) / FINE
            left, right, top, bottom = columns[0], columns[-1] + 1 / FINE, rows[0], rows[-1] + 1 / FINE
            half = max(right - left, bottom - top) / 2
            found[name] = (float(left + right) / 2, float(top + bottom) / 2, float(half))
        return found

    def extent(self, name: str) -> tuple[float, float]:
        """Half the width and half the height of a drawing whose longer side is 2."""
        alpha = self.sprite(name, "white", "all", 64).alpha > 0.5
        return float(alpha.any(0).sum()) / 64, float(alpha.any(1).sum()) / 64

    def _sprite(self, name: str, colour: str, layers: str, side: int) -> Sprite:
        """A drawing with a body of ``colour``; ``layers`` is ``all``, ``color`` or ``line``."""
        kind = self.kinds[name]
        body, shade = COLOURS[colour]
        swap = {kind.body: body} | {fill: shade for fill in kind.shade}
        return _unpacked(self._drawn(name, swap, layers, side))

    def _body(self, name: str, side: int) -> np.ndarray:
        """Where a drawing's body shows, below no line and no shade: (side, side) float32 in [0, 1]."""
        tree = self._trees[name]
        fills = {_hex(e.get("fill")) for e in tree.iter()} | {_hex(e.get("stroke")) for e in tree.iter()}
        lines = {fill: OTHER_FILL for fill in fills if fill}
        pixels = self._drawn(name, lines | {self.kinds[name].body: MASK_FILL}, "all", side, lines)
        return pixels[..., 0] * pixels[..., 3]

    def _drawn(
        self, name: str, swap: dict[str, str], layers: str, side: int, lines: dict[str, str] | None = None
    ) -> np.ndarray:
        x, y, half = self.boxes[name]
        tree = _swapped(self._trees[name], swap, layers, lines or {})
        return _raster(tree, x - half, y - half, 2 * half, side)


def _hex(value: str | None) -> str | None:
    """A paint as ``#rrggbb`` in lower case; None for anything else."""
    if value is None or not value.startswith("#"):
        return None
    digits = value[1:].lower()
    return "#" + ("".join(2 * d for d in digits) if len(digits) == 3 else digits)


def _swapped(
    root: ElementTree.Element, swap: dict[str, str], layers: str, lines: dict[str, str]
) -> ElementTree.Element:
    """A copy with only the given layers and with paints replaced: ``swap`` in colour layers, ``lines`` in line work."""
    copy = ElementTree.fromstring(ElementTree.tostring(root))
    for layer in list(copy):
        line = layer.get("id", "").startswith("line")
        if layers != "all" and line != (layers == "line"):
            copy.remove(layer)
        else:
            for element in layer.iter():
                for paint in ("fill", "stroke"):
                    old = _hex(element.get(paint))
                    new = (lines if line else swap).get(old or "")
                    if new is not None:
                        element.set(paint, new)
    return copy


def _raster(root: ElementTree.Element, left: float, top: float, extent: float, side: int) -> np.ndarray:
    """A square crop of an SVG as (side, side, 4) float32 in [0, 1], colours not premultiplied."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError('drawings need resvg-py; install it with `pip install "danceopd[openmoji]"`') from None
    root.set("viewBox", f"{left:.4f} {top:.4f} {extent:.4f} {extent:.4f}")
    root.set("width", str(side))
    root.set("height", str(side))
    text = ElementTree.tostring(root, encoding="unicode")
    image = Image.open(io.BytesIO(svg_to_bytes(svg_string=text, width=side, height=side, skip_system_fonts=True)))
    return np.asarray(image.convert("RGBA"), np.float32) / 255


def _unpacked(pixels: np.ndarray) -> Sprite:
    return Sprite(np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3]))
