"""`blind.html`: a page on which people vote which of two images is better, without names and in a random order.

One file without a request to the network, to be sent to anyone; it saves the votes as JSON. Which side is which model
is not in the page, but in `blind.json` beside it, with which `evidence/people.py` reads the votes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danceopd.bench.evidence.people import FORMAT as VOTES
from danceopd.bench.pages.render import render, script_of
from danceopd.bench.pairwise import Pair
from danceopd.bench.report.thumbnails import Thumbnail, thumbnail
from danceopd.common.files import disk_errors, write_atomic, write_json
from danceopd.errors import UserError

FORMAT = "danceopd-blind/1"
PAGE, KEY = "blind.html", "blind.json"
SIDE = 768
"""Longest side of an image in pixels."""
HERE = "danceopd.bench.pages"


def choose(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` pairs with both images, the categories in turn; UserError where there is none."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.a is not None and pair.b is not None:
            groups.setdefault((pair.capability, pair.category), []).append(pair)
    if not groups:
        raise UserError("no item has an image of both models, so there is nothing to vote on")
    longest = max(map(len, groups.values()))
    return [group[n] for n in range(longest) for group in groups.values() if n < len(group)][:count]


def write_blind(folder: Path, pairs: Sequence[Pair], about: Mapping[str, Any]) -> Path:
    """Write the page and its key into `folder`; returns the page's path.

    `about`: what the key says of the models. The page that is there already stays if it shows the same pairs, since
    people may be voting on it; UserError where the key that is there is of another page.
    """
    images = [{side: _image(getattr(pair, side)) for side in ("a", "b", "source")} for pair in pairs]
    kept = [(pair, of) for pair, of in zip(pairs, images) if of["a"] and of["b"]]
    if not kept:
        raise UserError("no image of these pairs can be read, so there is nothing to vote on")
    shown = [[p.capability, p.category, p.key, of["a"].uri, of["b"].uri] for p, of in kept]  # type: ignore[union-attr]
    shows = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    known, page = read_key(folder), secrets.token_hex(8)  # another order is another page
    if known is not None and (known.get("shows") != shows or not (folder / PAGE).is_file()):
        raise UserError(
            f"{folder} has {KEY} of another page, which people may have voted on; choose another --output, or delete it"
        )
    if known is None:
        order = secrets.SystemRandom()
        order.shuffle(kept)
        swapped = [order.random() < 0.5 for _ in kept]
        records = [
            {"capability": p.capability, "category": p.category, "key": p.key, "swapped": turned}
            for (p, _), turned in zip(kept, swapped)
        ]
        sides = [
            {"prompt": p.prompt, "source": of["source"], "left": of["b" if turned else "a"]}
            | {"right": of["a" if turned else "b"]}
            for (p, of), turned in zip(kept, swapped)
        ]
        values = {"pairs": sides, "page": page, "format": VOTES}
        html = render(HERE, "blind.html.j2", values, script_of(HERE, "blind.js.j2"), ("style", "blind"))
        with disk_errors(folder / PAGE):
            write_json(folder / KEY, {"format": FORMAT, "page": page, "shows": shows, **about, "pairs": records})
            write_atomic(folder / PAGE, html.encode("utf-8"))
    return folder / PAGE


def read_key(folder: Path) -> dict[str, Any] | None:
    """The contents of `blind.json`; None where there is none. UserError for a damaged one."""
    file = folder / KEY
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not isinstance(found["page"], str):
            raise ValueError("format")
        for pair in found["pairs"]:
            _ = pair["capability"], pair["category"], pair["key"], bool(pair["swapped"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged; without it nobody can tell which side was which model") from None
    return dict(found)


def _image(file: Path | None) -> Thumbnail | None:
    return thumbnail(file, SIDE)
