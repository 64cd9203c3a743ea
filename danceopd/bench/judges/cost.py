"""What a question to an endpoint costs: image encoding (`Codec`), tokens by size, dollars by price list.

The codec decides the size in which an image is sent, and the size the tokens. Before a question is sent, tokens are an
upper estimate: text at three bytes a token, an image at the larger of the two rules in use (512-pixel tiles after
scaling the short side to 768, or 28-pixel patches). Once it is answered, the endpoint's own count is used.
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from danceopd.errors import UserError

OPENAI_HOST = "api.openai.com"
LIST_PRICES = {  # OpenAI's list prices of March 2026: dollars per million tokens, in and out; longest name first
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-5-mini": (0.25, 2.00),
    "gpt-5-nano": (0.05, 0.40),
    "gpt-5": (1.25, 10.00),
}
PATCH_FACTORS = {"mini": 1.72, "nano": 2.46}  # by which OpenAI's small models multiply an image's patches
TYPICAL_OUT = 250  # tokens of a score with its reasoning
TYPICAL_THINKING = 1000  # tokens before it, of a reasoning model: a guess
OVERHEAD = 30  # tokens of the message format


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """US dollars of so many tokens."""
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def prices_of(model: str, url: str, price_in: float | None, price_out: float | None) -> Prices | None:
    """The user's prices, else OpenAI's list prices for its models on its own host; None: unknown."""
    if (price_in is None) != (price_out is None):
        raise UserError("one of --price-in and --price-out is missing; give both, in dollars per million tokens")
    if price_in is not None and price_out is not None:
        if not (0 <= price_in < math.inf and 0 <= price_out < math.inf):
            raise UserError(f"--price-in {price_in} and --price-out {price_out} must be dollars, zero or more")
        return Prices(price_in, price_out)
    if urlsplit(url).hostname != OPENAI_HOST:
        return None
    for name in sorted(LIST_PRICES, key=len, reverse=True):
        if model == name or model.startswith(f"{name}-20"):  # or a dated snapshot, no other model
            return Prices(*LIST_PRICES[name])
    return None


def text_tokens(text: str) -> int:
    """An upper estimate of a text's tokens: English has about four bytes a token, Chinese three."""
    return math.ceil(len(text.encode()) / 3)


def image_tokens(width: int, height: int, model: str = "") -> int:
    """An upper estimate of an image's tokens over the models in use, and of one that counts an image as several."""
    shrink = min(1.0, 2048 / max(width, height))
    scale = 768 / (min(width, height) * shrink) * shrink
    scale = min(scale, 2048 / max(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    patches = math.ceil(width / 28) * math.ceil(height / 28)
    if model.startswith("gpt-4o-mini"):
        return 2833 + 5667 * tiles
    factor = PATCH_FACTORS.get("mini" if "-mini" in model else "nano" if "-nano" in model else "", 1.0)
    return max(85 + 170 * tiles, math.ceil(patches * factor))


@dataclass(frozen=True)
class Codec:
    """How images are sent: ``form`` png or jpeg, JPEG ``quality``, and the ``longest`` side in pixels (None: as is)."""

    form: str = "png"
    quality: int | None = None
    longest: int | None = None

    @classmethod
    def parse(cls, text: str = "png", longest: int | None = None) -> Codec:
        """The codec of "png", "jpeg" (quality 95) or "jpeg:75"."""
        match = re.fullmatch(r"(png|jpe?g)(?::(\d+))?", text.strip().lower())
        quality = int(match[2]) if match and match[2] else 95
        if not match or (match[1] == "png" and match[2]) or not 1 <= quality <= 100:
            raise UserError(f"--judge-codec is {text!r}; give png, jpeg, or jpeg:QUALITY with 1 to 100")
        if longest is not None and longest < 16:
            raise UserError(f"--judge-longest is {longest}; give 16 pixels or more")
        return cls("png", None, longest) if match[1] == "png" else cls("jpeg", quality, longest)

    @property
    def identity(self) -> dict[str, Any]:
        """Its settings, which are part of the judge's identity."""
        return {"codec": self.form, "quality": self.quality, "longest": self.longest}

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) in which an image is sent: never enlarged, sides in proportion."""
        side = max(image.size)
        if self.longest is None or side <= self.longest:
            return image.size
        return tuple(max(1, round(length * self.longest / side)) for length in image.size)  # type: ignore[return-value]

    def resized(self, image: Image.Image) -> Image.Image:
        """The image in the size in which it is sent (Lanczos)."""
        size = self.size(image)
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)

    def data_url(self, image: Image.Image) -> str:
        """The image as a ``data:`` URL."""
        buffer = BytesIO()
        image = self.resized(image)
        if self.form == "png":
            image.save(buffer, "PNG")
        else:
            image.save(buffer, "JPEG", quality=self.quality)
        return f"data:image/{self.form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
