"""Open images: a path or a PIL image goes in, an upright RGB image comes out; its size can be read from the header."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from danceopd.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""File suffixes that count as images."""
MIN_SIDE = 64
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF: the tag, and its values that swap width and height

ImageSource = Image.Image | Path
"""An image, or the path of one that is opened when it is needed."""


def open_image(source: ImageSource, where: str = "", check: bool = True) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation. `where` is how a message names the row.

    UserError for a path that is no readable image. With `check` as for training data: also for an alpha channel, and
    for a side below 64 pixels.
    """
    if isinstance(source, Image.Image):
        image = _checked(source, where or "the source image") if check else source
        return image if image.mode == "RGB" else image.convert("RGB")
    with _opened(source, where) as image:
        if check:
            _checked(image, f"{_prefix(where)}{source}")
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{_prefix(where)}{source} is a damaged image ({error}); replace it") from None


def picture(source: ImageSource) -> Image.Image:
    """`open_image` without the checks on training data: a benchmark's images may be small or have an alpha channel."""
    return open_image(source if isinstance(source, Image.Image) else Path(source), check=False)


def image_size(source: ImageSource, where: str = "") -> tuple[int, int]:
    """(width, height) in pixels once upright, from the header alone; UserError as `open_image`."""
    if isinstance(source, Image.Image):
        return _checked(source, where or "the source image").size
    with _opened(source, where) as image:
        width, height = _checked(image, f"{_prefix(where)}{source}").size
        return (height, width) if image.getexif().get(ORIENTATION) in QUARTER_TURNS else (width, height)


def _opened(path: Path, where: str) -> Image.Image:
    """The image file, opened by its header."""
    if not path.exists():
        raise UserError(f"{_prefix(where)}image {path} does not exist; check the path")
    try:
        return Image.open(path)
    except (UnidentifiedImageError, Image.DecompressionBombError, IsADirectoryError, SyntaxError, ValueError):
        raise UserError(f"{_prefix(where)}{path} is not an image; give a PNG, JPEG or WebP file") from None
    except OSError as error:
        raise UserError(f"{_prefix(where)}image {path} cannot be read: {error.strerror or error}") from None


def _checked(image: Image.Image, name: str) -> Image.Image:
    """The image itself; UserError when it has an alpha channel or is too small."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        raise UserError(f"{name} has an alpha channel, which no model here reads; flatten it onto a background")
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise UserError(f"{name} is {size} pixels, too small; give at least {MIN_SIDE}x{MIN_SIDE}")
    return image


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""
