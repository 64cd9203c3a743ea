"""Images as data URIs for the report: small ones exact, large ones as thumbnails.

An image of at most 128 pixels a side is embedded losslessly as PNG; a larger one becomes a WebP of a given longest
side. Each file is read once, by a few threads, since Pillow decodes outside of Python's lock. Only files inside the
bench's folder are read: a report is made to be shared, and the folder may be a stranger's.
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

from danceopd.common.files import inside

EXACT = 128
"""Longest side in pixels up to which an image is embedded losslessly."""
QUALITY = 78
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Thumbnail:
    """One embedded image: its data URI, its size in pixels, and whether it is lossless."""

    uri: str
    width: int
    height: int
    exact: bool


def thumbnail(file: Path | None, side: int) -> Thumbnail | None:
    """The thumbnail of a file, at most `side` pixels a side; None for a missing or unreadable image."""
    if file is None:
        return None
    try:
        with Image.open(file) as image:
            exact = max(image.size) <= EXACT
            if not exact:
                image.draft("RGB", (2 * side, 2 * side))  # JPEG only: decode at a reduced size
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
    """Thumbnails of a bench's images by path: `fetch` reads many at once, a call returns one of those."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Thumbnail | None] = {}

    def fetch(self, paths: Iterable[str], side: int) -> int:
        """Read the images that are not known yet, at most `side` pixels a side; returns the characters of all."""
        wanted = list(paths)
        new = [path for path in dict.fromkeys(wanted) if path not in self._found]
        with ThreadPoolExecutor(THREADS) as threads:
            for path, found in zip(new, threads.map(lambda path: thumbnail(inside(self.folder, path), side), new)):
                self._found[path] = found
        return sum(len(found.uri) for path in wanted if (found := self._found[path]))

    def __call__(self, path: str | None) -> Thumbnail | None:
        """The thumbnail of a fetched path, or None."""
        return self._found.get(path) if path else None
