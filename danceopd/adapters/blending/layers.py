"""Weights by layer: patterns of layers and numbers go in, what each layer is blended with comes out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from danceopd.common.messages import few
from danceopd.errors import UserError


@dataclass(frozen=True)
class LayerRule:
    """Layers, by a regular expression that is found in their names, and their numbers.

    One number multiplies the blend of these layers, 0 leaves them out. As many as there are adapters are the adapters'
    weights there. `given` is what the user wrote, for messages.
    """

    pattern: str
    numbers: tuple[float, ...]
    given: str


def parse_layers(texts: Sequence[str]) -> list[LayerRule]:
    """`--layers` texts, REGEX=NUMBER or REGEX=NUMBER,NUMBER; UserError for another form."""
    rules = []
    for text in texts:
        pattern, numbers = _split(text, "--layers", "'attn=0.5'")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"--layers has {pattern!r}, which is no regular expression ({error}); mend it") from None
        rules.append(LayerRule(pattern, numbers, f"--layers {text!r}"))
    return rules


def parse_blocks(texts: Sequence[str]) -> list[LayerRule]:
    """`--blocks` texts, [STACK.]FROM[-TO]=NUMBER, as rules: '0-9=0.5', 'single_transformer_blocks.3=0,1'."""
    rules = []
    for text in texts:
        blocks, numbers = _split(text, "--blocks", "'0-9=0.5'")
        found = re.fullmatch(r"(?:([A-Za-z_]\w*)\.)?(\d{1,4})(?:-(\d{1,4}))?", blocks)
        first, last = (int(found[2]), int(found[3] or found[2])) if found else (1, 0)
        if not found or last < first:
            raise UserError(
                f"--blocks has {blocks!r}, which is no block or range of blocks; write 3, 3-7, or with the name of the "
                "stack single_transformer_blocks.3-7"
            )
        stack = re.escape(found[1]) if found[1] else r"[^.\d]+"
        every = "|".join(map(str, range(first, last + 1)))
        rules.append(LayerRule(rf"^{stack}\.({every})\.", numbers, f"--blocks {text!r}"))
    return rules


def _split(text: str, flag: str, example: str) -> tuple[str, tuple[float, ...]]:
    pattern, sign, numbers = text.rpartition("=")
    try:
        found = tuple(float(word) for word in numbers.split(","))
    except ValueError:
        found = ()
    if not (sign and pattern.strip() and found) or not all(abs(number) <= 1e4 for number in found):
        raise UserError(f"{flag} has {text!r}; write layers and a weight from -1e4 to 1e4, as {example}")
    return pattern.strip(), found


def check_rules(rules: Sequence[LayerRule], names: Sequence[str], adapters: int) -> None:
    """UserError for a rule that fits no layer, or has another number of weights than there are adapters."""
    for rule in rules:
        if len(rule.numbers) not in (1, adapters):
            raise UserError(
                f"{rule.given} has {len(rule.numbers)} weights and here are {adapters} adapters; give one number for "
                "the blend there, or one weight for each adapter"
            )
        if not any(re.search(rule.pattern, name) for name in names):
            raise UserError(
                f"{rule.given} fits none of the {len(names)} layers ({few(names)}); `danceopd inspect FILE --names` "
                "lists them"
            )


def weights_of(name: str, rules: Sequence[LayerRule], weights: Sequence[float]) -> tuple[list[float], float]:
    """(the adapters' weights in a layer, what its blend is multiplied by). The last rule that fits counts."""
    fits = [rule.numbers for rule in rules if re.search(rule.pattern, name)]
    if not fits:
        return list(weights), 1.0
    if len(fits[-1]) == 1:
        return list(weights), fits[-1][0]
    return list(fits[-1]), 1.0
