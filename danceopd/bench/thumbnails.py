"""Pictures as data URIs: small ones exact, large ones as thumbnails, each read once.

A picture of at most 128 pixels a side is kept to the last bit as PNG; a larger one becomes a WebP of a given longest
side. Files are read by a few threads, since Pillow decodes outside of Python's lock.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

EXACT = 128
"""Pixels a side up to which a picture is kept as it is."""
QUALITY = 78
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Thumbnail:
    """One inlined picture: its data URI, its size in the page's pixels, and whether no pixel was lost."""

    uri: str
    width: int
    height: int
    exact: bool


def thumbnail(file: Path, side: int) -> Thumbnail | None:
    """The picture of a file, at most `side` pixels a side; None where there is no readable picture."""
    try:
        with Image.open(file) as image:
            exact = max(image.size) <= EXACT
            if not exact:
                image.draft("RGB", (2 * side, 2 * side))  # JPEG alone: decoded at a part of its size
            shown = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    stream = io.BytesIO()
    if exact:
        shown.save(stream, "PNG")
    else:
        shown.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        shown.save(stream, "WEBP", quality=QUALITY, method=2)
    text = base64.b64encode(stream.getvalue()).decode()
    return Thumbnail(f"data:image/{'png' if exact else 'webp'};base64,{text}", *shown.size, exact)


class Thumbnails:
    """Thumbnails of a bench's pictures by path; `fetch` reads many at once, a call gives one that was fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Thumbnail | None] = {}

    def fetch(self, paths: Iterable[str], side: int) -> int:
        """Read the pictures, at most `side` pixels a side, unless they are known; returns the characters of all."""
        wanted = list(paths)
        new = [path for path in dict.fromkeys(wanted) if path not in self._found]
        with ThreadPoolExecutor(THREADS) as threads:
            for path, found in zip(new, threads.map(lambda path: thumbnail(self.folder / path, side), new)):
                self._found[path] = found
        return sum(len(found.uri) for path in wanted if (found := self._found[path]))

    def __call__(self, path: str | None) -> Thumbnail | None:
        """The thumbnail of a path that was fetched, or None."""
        return self._found.get(path) if path else None
