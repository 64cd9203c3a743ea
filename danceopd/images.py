"""Source images: opened one at a time, upright and in RGB, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST = 64
UPRIGHT, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: the tag, and the values that turn a picture by a quarter

Source = Image.Image | Path


def open_image(source: Source, where: str = "") -> Image.Image:
    """The picture in RGB, upright; refuses what is not an image, is smaller than 64 pixels, or has alpha."""
    if isinstance(source, Image.Image):
        return _checked(source, where or "the source image").convert("RGB")
    with _look(source, where) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{_at(where)}{source} is a damaged image ({error}); replace it") from None


def image_size(source: Source, where: str = "") -> tuple[int, int]:
    """(width, height) in pixels once upright, from the header alone; refuses what the header shows to be wrong."""
    if isinstance(source, Image.Image):
        return _checked(source, where or "the source image").size
    with _look(source, where) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(UPRIGHT) in TURNED else (width, height)


def _look(path: Path, where: str = "") -> Image.Image:
    """The image file, opened and checked by its header."""
    if not path.exists():
        raise UserError(f"{_at(where)}image {path} does not exist; check the path")
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, Image.DecompressionBombError, IsADirectoryError, SyntaxError, ValueError):
        raise UserError(f"{_at(where)}{path} is not an image; give a PNG, JPEG or WebP file") from None
    except OSError as error:
        raise UserError(f"{_at(where)}image {path} cannot be read: {error.strerror or error}") from None
    return _checked(image, f"{_at(where)}{path}")


def _checked(image: Image.Image, where: str) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        raise UserError(f"{where} has an alpha channel, which no model here reads; flatten it onto a background")
    if min(image.size) < SMALLEST:
        raise UserError(
            f"{where} is {image.width}x{image.height} pixels, too small; give at least {SMALLEST}x{SMALLEST}"
        )
    return image


def _at(where: str) -> str:
    return f"{where}: " if where else ""
