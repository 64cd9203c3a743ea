"""Open images: a path, a picture or a picture's bytes go in, an upright RGB image comes out; its size, from the header.

Where the model reads alpha channels, a picture that has one comes out as RGBA.

Pictures of more than 8 bits are scaled to 8. What cannot be shown as it is meant is refused, or said in one warning:
alpha channels that are not opaque, pictures that are cut off, numbers of an unknown range, CMYK, animations.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from danceopd.common.messages import clipped
from danceopd.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""File suffixes that count as images."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""What Pillow may find in a file, whatever its suffix; not PostScript, which is a program."""
READING = 2
"""Counts the changes to what a file's pixels are read as; encoded rows are kept under it."""
MIN_SIDE = 64
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF: the tag, and its values that swap width and height
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error)
"""What Pillow raises while it reads a damaged file."""

ImageSource = Image.Image | Path | bytes
"""An image, or the path or the bytes of one that is opened when it is needed."""
Sources = ImageSource | list[ImageSource]
"""What an edit starts from: a picture, or several in their order."""
_log = logging.getLogger("danceopd")
_sizes: dict[tuple[str, int, int], tuple[int, int]] = {}  # of files, by path, time and bytes


def each_source(sources: Sources) -> list[ImageSource]:
    """The pictures of an edit as a list; the first is the one that is edited."""
    return sources if isinstance(sources, list) else [sources]


def open_image(source: ImageSource, where: str = "", check: bool = True, alpha: bool = False) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation. `where` is how a message names the row.

    With `alpha` an image that has an alpha channel is in RGBA. UserError for what is no readable image. With `check` as
    for training data: also for an alpha channel that is not opaque, where it is not kept, and for a side below 64
    pixels.
    """
    name = _name(source, where)
    with _opened(source, where) as image, _damage(name):
        if check:
            _check(image, name, alpha)
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA") if alpha and _has_alpha(upright) else _rgb(upright, name)


def flattened(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent, as Qwen-Image-2.1 was trained to see it."""
    if not _has_alpha(image):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def edited_picture(sources: Sources) -> Image.Image:
    """The picture that is edited, to be shown or compared with: the first source, flattened."""
    return flattened(open_image(each_source(sources)[0], alpha=True))


def picture(source: ImageSource | str) -> Image.Image:
    """`open_image` without the checks on training data: a benchmark's images may be small or have an alpha channel."""
    return open_image(Path(source) if isinstance(source, str) else source, check=False)


def image_size(source: ImageSource, where: str = "", alpha: bool = False) -> tuple[int, int]:
    """(width, height) in pixels once upright, from the header; UserError as `open_image`, also for a file cut off."""
    key = None
    if isinstance(source, Path):
        stat = _stat(source, where)
        if (key := (str(source), stat.st_mtime_ns, stat.st_size)) in _sizes:
            return _sizes[key]
    name = _name(source, where)
    with _opened(source, where) as image, _damage(name):
        late = isinstance(source, Image.Image) or _check_whole(image)
        _check(image, name, alpha)
        # PngImageFile.getexif reads all pixels on its way to the last chunk
        exif = Image.Image.getexif(image) if image.format == "PNG" and not late else image.getexif()
        size = image.size[::-1] if exif.get(ORIENTATION) in QUARTER_TURNS else image.size
    if key is not None and not alpha:
        _sizes[key] = size
    return size


# -- opening ----------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: ImageSource, where: str) -> Iterator[Image.Image]:
    """The image, opened by its header."""
    if isinstance(source, Image.Image):
        yield source
        return
    name = _name(source, where)
    if isinstance(source, Path):
        _stat(source, where)
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(stream)
            if image.format not in FORMATS:
                raise UnidentifiedImageError
            yield image
    except Image.DecompressionBombError as error:
        pixels = int((re.findall(r"\d+", str(error)) or ["0"])[0]) / 1e6
        raise UserError(f"{name} has {pixels:,.0f} megapixels, more than can be read; make it smaller") from None
    except (UnidentifiedImageError, SyntaxError, ValueError):
        raise UserError(f"{name} is not an image; give a PNG, JPEG or WebP file") from None
    except OSError as error:
        if error.errno is None:  # of Pillow, not of the system
            raise UserError(f"{name} is a damaged image ({error}); replace it") from None
        raise UserError(f"{name} cannot be read ({error.strerror}); check the file") from None


def _stat(path: Path, where: str) -> os.stat_result:
    """Of a file; UserError for what is none, which is never opened: a pipe would wait for ever."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # also names that are too long or hold a NUL
        raise UserError(missing_image(path, where)) from None
    if not path.is_file():
        raise UserError(f"{_name(path, where)} is not an image; give a PNG, JPEG or WebP file")
    return stat


def missing_image(path: Path, where: str) -> str:
    """The sentence about a path that does not exist."""
    prefix = f"{where}: " if where else ""
    return f"{prefix}image {clipped(str(path), 160)} does not exist{near_name(path)}"


def _name(source: ImageSource, where: str) -> str:
    prefix = f"{where}: " if where else ""
    return f"{prefix}{clipped(str(source), 160)}" if isinstance(source, Path) else where or "the source image"


@contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{name} is a damaged image ({clipped(str(error), 100)}); replace it") from None


# -- checks -----------------------------------------------------------------------------------------------


def _check(image: Image.Image, name: str, alpha: bool = False) -> None:
    """UserError for an alpha channel that is not opaque and not kept, and for a side that is too small; warnings, once
    each."""
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise UserError(f"{name} is {size} pixels, too small; give at least {MIN_SIDE}x{MIN_SIDE}")
    if not alpha and _has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise UserError(f"{name} has an alpha channel, which this model does not read; flatten it onto a background")
    if image.mode == "CMYK":
        warn_once("is CMYK, and is converted to RGB without its colour profile", name)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's second picture of the same
        warn_once("has several frames or pages, of which the first is read", name)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


_warned: set[str] = set()


def warn_once(what: str, name: str) -> None:
    """One warning for all pictures of the kind."""
    if what not in _warned:
        _warned.add(what)
        _log.warning("%s %s (said of the first only)", name, what)


def _check_whole(image: Any) -> bool:
    """OSError where a file is cut off; whether something that may turn a PNG follows its pixels.

    By the end of the file where its kind has one, without reading the pixels; else by reading them.
    """
    if image.fp is None:  # some kinds are read whole as they are opened
        image.load()
        return False
    file = getattr(image.fp, "raw", image.fp)  # below the buffer, whose place is restored
    place, size = file.tell(), file.seek(0, os.SEEK_END)
    try:
        if image.format == "PNG":
            return _check_chunks(file, size)
        ends = {"JPEG": b"\xff\xd9", "GIF": b"\x3b"}.get(image.format, b"none")
        file.seek(max(0, size - len(ends)))
        whole = file.read(len(ends)) == ends
        if image.format == "WEBP":
            file.seek(4)
            whole = 8 + struct.unpack("<I", file.read(4))[0] <= size
    finally:
        file.seek(place)
    if not whole:  # also a whole file with something behind it
        image.load()
    return False


def _check_chunks(file: Any, size: int) -> bool:
    """Of a PNG: whether texts or EXIF stand behind the pixels. OSError where the last chunk is missing."""
    at, kind, pixels, late = 8, b"", False, False
    while kind != b"IEND" and at + 12 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        at += 12 + length
        late |= kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and pixels
        pixels = pixels or kind == b"IDAT"
    if kind != b"IEND" or at > size:
        raise OSError("image file is truncated")
    return late


# -- pixels -----------------------------------------------------------------------------------------------


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """In RGB of 8 bits; `convert` alone would cut 16 bits off at 255, and make 0..1 black."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(numbers: np.ndarray, name: str) -> np.ndarray:
    """Grey values of 16 bits, of 0 to 1, or whole ones of 0 to 255 as (H, W) uint8; UserError for any other range."""
    low, high = float(numbers.min()), float(numbers.max())
    if numbers.dtype.itemsize == 2:
        return ((numbers.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    whole = low >= 0 and bool((numbers == np.round(numbers)).all())
    if low >= 0 and high <= 1 and numbers.dtype.kind == "f":
        return np.round(numbers * 255).astype(np.uint8)
    if whole and high <= 255:
        return numbers.astype(np.uint8)
    if whole and high <= 65535 and numbers.dtype.kind != "f":
        return np.round(numbers / 257).astype(np.uint8)
    raise UserError(f"{name} has grey values from {low:g} to {high:g}, whose white is not known; save it with 8 bits")


def near_name(path: Path) -> str:
    """What to do about a path that does not exist: the name beside it that only looks the same, or to check it."""

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    if "\\" in path.name:
        return "; write / in place of \\"
    try:
        same = [name for name in os.listdir(path.parent) if folded(name) == folded(path.name) and name != path.name]
    except (OSError, ValueError):
        same = []
    return f"; did you mean {clipped(same[0], 80)!r}?" if same else "; check the path"
