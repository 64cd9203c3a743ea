"""A judge-free metric: how warm a picture's colours are."""

from PIL import Image, ImageStat


def warmth(image: Image.Image, source: Image.Image | None, target: Image.Image | None, prompt: str) -> float:
    """Mean red less mean blue, from -1 to 1; of an edit, less that of its source."""
    return _warmth(image) - (0.0 if source is None else _warmth(source))


def _warmth(image: Image.Image) -> float:
    red, _, blue = ImageStat.Stat(image.convert("RGB")).mean
    return (red - blue) / 255
