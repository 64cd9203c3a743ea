"""Paraphrases of the prompts and instructions of synthetic scenes, and longer versions, by rule.

For other data both come from the columns `paraphrases` and `expanded`. The templates of `prompts.py` and `edits.py` are
few, so a rule gives each its other forms, and a longer form that adds no fact: a style that is not named is flat, and
an edit may be stated twice. A text that fits no template has neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from danceopd.worlds.scenes.grammar import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, STYLES, a

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FLAT = " in flat style"


def _any(words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(words) + ")"


_THING = rf"an? (?:{_any(COLOURS)} )?{_any(SHAPES)}"
_PAIR = re.compile(rf"({_THING}) (and|{'|'.join(RELATIONS)}) ({_THING})")
_NAMED = rf"(?:(?:{_any(COLOURS)}|leftmost|rightmost) )?(?:{_any(SHAPES)}|shape)"
_GROUND, _COLOUR, _STYLE = _any(BACKGROUNDS), _any(COLOURS), _any(STYLES)
_TAIL = rf"(?P<ground> on an? {_GROUND} background)?(?P<style> in {_STYLE} style)?"
_PROMPT = re.compile(rf"a photo of (?P<body>.+?){_TAIL}")

Rule = tuple[str, Callable[[re.Match[str]], str], Callable[[re.Match[str]], str | None]]
_EDITS: list[Rule] = [  # the pattern of an instruction, its paraphrase, and what may be said after it
    (
        rf"change the background to ({_GROUND})",
        lambda m: f"put it on {a(m[1])} background",
        lambda m: f"put it on {a(m[1])} background",
    ),
    (
        rf"put it on an? ({_GROUND}) background",
        lambda m: f"change the background to {m[1]}",
        lambda m: f"change the background to {m[1]}",
    ),
    (rf"make it ({_STYLE})", lambda m: f"redraw this in {m[1]} style", lambda m: f"redraw this in {m[1]} style"),
    (rf"redraw this in ({_STYLE}) style", lambda m: f"make it {m[1]}", lambda m: f"make it {m[1]}"),
    (rf"remove the ({_NAMED})", lambda m: f"take away the {m[1]}", lambda m: f"take away the {m[1]}"),
    (rf"take away the ({_NAMED})", lambda m: f"remove the {m[1]}", lambda m: f"remove the {m[1]}"),
    (
        rf"make the ({_NAMED}) ({_COLOUR})",
        lambda m: f"change the colour of the {m[1]} to {m[2]}",
        lambda m: f"change the colour to {m[2]}",
    ),
    (
        rf"change the colour of the ({_NAMED}) to ({_COLOUR})",
        lambda m: f"make the {m[1]} {m[2]}",
        lambda m: f"make it {m[2]}",
    ),
    (
        rf"turn the ({_NAMED}) into ({_THING})",
        lambda m: f"replace the {m[1]} with {m[2]}",
        lambda m: f"remove the {m[1]}",
    ),
    (
        rf"replace the ({_NAMED}) with ({_THING})",
        lambda m: f"turn the {m[1]} into {m[2]}",
        lambda m: f"remove the {m[1]}",
    ),
    (  # no repetition: a thing that is added twice would be there twice
        rf"add ({_THING}) ({_any(RELATIONS)} the {_NAMED}|in the .+ corner)",
        lambda m: f"put {m[1]} {m[2]}",
        lambda m: None,
    ),
]


def paraphrases(prompt: str) -> list[str]:
    """Paraphrases of a prompt or instruction, the closest first; [] when it fits no template."""
    for pattern, other, _ in _EDITS:
        if match := re.fullmatch(pattern, prompt):
            return [other(match)]
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        return []
    body, ground, style = match["body"], match["ground"] or "", match["style"] or ""
    bodies = [body, _swapped(body)]
    tails = [ground + style, style + ground] if style else [ground, ground + FLAT]
    found = [f"a photo of {things}{tail}" for tail in dict.fromkeys(tails) for things in bodies if things]
    return [other for other in dict.fromkeys(found) if other != prompt]


def expanded(prompt: str) -> str | None:
    """A longer version of a prompt or instruction that adds no fact; None when there is none."""
    for pattern, _, after in _EDITS:
        if match := re.fullmatch(pattern, prompt):
            more = after(match)
            return None if more is None else f"{prompt} and {more}"
    match = _PROMPT.fullmatch(prompt)
    return None if match is None or match["style"] else prompt + FLAT


def _swapped(body: str) -> str:
    """Two things in the other order with the opposite relation; "" for anything else."""
    match = _PAIR.fullmatch(body)
    if match is None:
        return ""
    return f"{match[3]} {OPPOSITE.get(match[2], match[2])} {match[1]}"
