"""What a question to a paid judge takes: tokens from sizes, dollars from a small table or the user's own prices.

Before it is asked this is an upper estimate: text at three bytes a token, a picture at whichever is more of the two
rules in use (512-pixel tiles after scaling the short side to 768, or 28-pixel patches). Afterwards the judge's own
count goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from danceopd.errors import UserError

OPENAI_HOST = "api.openai.com"
LIST_PRICES = {  # OpenAI's list prices of March 2026: dollars a million tokens, in and out; longest name first
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-5-mini": (0.25, 2.00),
    "gpt-5-nano": (0.05, 0.40),
    "gpt-5": (1.25, 10.00),
}
TYPICAL_OUT = 250  # tokens of a score with its reasons
TYPICAL_THOUGHT = 1000  # tokens before it, of a model that thinks: a guess
OVERHEAD = 30  # tokens of a message's frame


@dataclass(frozen=True)
class Prices:
    """Dollars a million tokens."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Dollars."""
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def prices_of(model: str, url: str, price_in: float | None, price_out: float | None) -> Prices | None:
    """The user's prices, else OpenAI's own for a model of theirs on their own host; None: not known."""
    if (price_in is None) != (price_out is None):
        raise UserError("one of --price-in and --price-out is missing; give both, in dollars a million tokens")
    if price_in is not None and price_out is not None:
        if not (0 <= price_in < math.inf and 0 <= price_out < math.inf):
            raise UserError(f"--price-in {price_in} and --price-out {price_out} must be zero or more dollars")
        return Prices(price_in, price_out)
    if urlsplit(url).hostname != OPENAI_HOST:
        return None
    for name in sorted(LIST_PRICES, key=len, reverse=True):
        if model == name or model.startswith(f"{name}-20"):  # the model or one of its dated snapshots, no relative
            return Prices(*LIST_PRICES[name])
    return None


def text_tokens(text: str) -> int:
    """An upper estimate: English has about four bytes a token, Chinese three."""
    return math.ceil(len(text.encode()) / 3)


def picture_tokens(width: int, height: int) -> int:
    """An upper estimate over the models in use."""
    shrink = min(1.0, 2048 / max(width, height))
    scale = 768 / (min(width, height) * shrink) * shrink
    scale = min(scale, 2048 / max(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    patches = math.ceil(width / 28) * math.ceil(height / 28)
    return max(85 + 170 * tiles, patches)
