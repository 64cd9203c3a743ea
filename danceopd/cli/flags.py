"""What flags hold: words and numbers with commas between, and pairs of a name and a value."""

from __future__ import annotations

from collections.abc import Iterable

from danceopd.errors import UserError


def words(text: str) -> list[str]:
    """`a, b` as its parts."""
    return [word.strip() for word in text.split(",") if word.strip()]


def number(text: str, flag: str) -> float:
    """A number, or a sentence that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} has {text!r}, which is no number; write numbers with commas between") from None


def pairs(texts: Iterable[str], flag: str, example: str) -> dict[str, str]:
    """`name=value` texts as a mapping; a sentence for one without `=` or a name, and for a name that comes twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (sign and name and value):
            raise UserError(f"{flag} has {text!r}; write a name and what it stands for, as {example}")
        if name in found:
            raise UserError(f"{flag} names {name!r} twice; name each once")
        found[name] = value
    return found
