"""`compare.html`: two models of finished benches side by side, with pictures, on one self-contained page.

First the verdict and the pictures: where the first model lost most, some where it did not matter, and where it gained
most. Then the tables, how the two recipes differ, and what else was not equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from danceopd.bench.compare import Side
from danceopd.bench.evidence.people import sentences
from danceopd.bench.metrics.names import words_of
from danceopd.bench.pages.render import render
from danceopd.bench.pages.tables import HEADS, notes, tables
from danceopd.bench.report import facts
from danceopd.bench.report.thumbnails import Thumbnail, thumbnail
from danceopd.bench.report.verdict import SIGN
from danceopd.common.files import disk_errors, write_atomic

SHOWN = 6
"""Items of each kind and capability."""
SIDE = 384
"""Longest side of an image in pixels."""
NAME = "compare.html"
ELSEWHERE = ("people:", "agreement of", "A - B:")
"""Beginnings of notes that the page says in another place."""


def write_page(folder: Path, found: Mapping[str, Any], a: Side, b: Side) -> Path:
    """Write the page of a comparison (the contents of compare.json) into `folder`; returns its path."""
    path = folder / NAME
    values = {
        "found": found,
        "names": {"a": _label(found["a"]), "b": _label(found["b"])},
        "sign": SIGN,
        "groups": {c: groups for c in found["capabilities"] if (groups := _groups(found, c, a, b))},
        "titles": facts.CAPABILITIES,
        "measure": {c: facts.measure(a.scores, c) for c in found["capabilities"]},
        "share": {c: facts.is_share(a.scores, c) for c in found["capabilities"]},
        "heads": HEADS,
        "tables": tables(found),  # type: ignore[arg-type]
        "metrics": _metrics(found),
        "recipe": recipe_differences(a.scores.get("recipe_yaml"), b.scores.get("recipe_yaml")),
        "people": sentences(found["people"]) if found.get("people") else [],
        "notes": [line for line in notes(found) if not line.startswith(ELSEWHERE)],  # type: ignore[arg-type]
        "same": a.folder.resolve() == b.folder.resolve(),
    }
    html = render("danceopd.bench.pages", "compare.html.j2", values, styles=("style", "compare"))
    with disk_errors(path):
        write_atomic(path, html.encode("utf-8"))
    return path


def _label(about: Mapping[str, Any]) -> str:
    return str(about.get("label") or about["model"])


def _groups(found: Mapping[str, Any], capability: str, a: Side, b: Side) -> list[dict[str, Any]]:
    """The items to look at: {title, items}; each with its images. An item stands in one group only."""
    mine = [i for i in found["items"] if i["capability"] == capability and i["difference"] is not None]
    mine = [i for i in mine if a.path(i["a_image"]) or b.path(i["b_image"])]
    lost = [i for i in mine if i["difference"] < 0][:SHOWN]
    gained = [i for i in reversed(mine) if i["difference"] > 0][:SHOWN]
    rest = [i for i in mine if i not in lost and i not in gained]
    middle = [rest[at] for at in dict.fromkeys(len(rest) * quarter // 4 for quarter in (1, 2, 3))] if rest else []
    named = (("A lost most against B", lost), ("In between", middle), ("A gained most over B", gained))
    return [{"title": title, "items": [_shown(i, a, b) for i in items]} for title, items in named if items]


def _shown(item: Mapping[str, Any], a: Side, b: Side) -> dict[str, Any]:
    paths = {"source": a.path(item.get("source")), "a": a.path(item["a_image"]), "b": b.path(item["b_image"])}
    pictures: dict[str, Thumbnail | None] = {side: thumbnail(path, SIDE) for side, path in paths.items()}
    return {"item": item, "pictures": pictures}


def _metrics(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The judge-free metrics in words: {name, better, a_better, figure}; `a_better` None where it cannot be told."""
    made = []
    for capability, parts in found["capabilities"].items():
        for name, figure in parts["metrics"].items():
            words = words_of(name)
            sign = 1 if figure["low"] > 0 else -1 if figure["high"] < 0 else 0
            way = {"↑": 1, "↓": -1}.get(words.better, 0)
            better = None if not sign * way else sign * way > 0
            made.append({"name": f"{capability}: {words.name}", "better": words.better, "meaning": words.meaning}
                        | {"a_better": better, "figure": figure})  # fmt: skip
    return made


def recipe_differences(one: str | None, other: str | None) -> list[tuple[str, str, str]]:
    """(key, value of A, value of B) of every key in which two recipes differ; empty where either is not known."""
    try:
        a, b = (dict(_flat(yaml.safe_load(text))) if text else None for text in (one, other))
    except yaml.YAMLError:
        return []
    if a is None or b is None:
        return []
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key) and key != "output"]
    one_of, other_of = ([("–" if side.get(key) is None else str(side[key])) for key in keys] for side in (a, b))
    return list(zip(keys, one_of, other_of))


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """The leaves of plain data under dotted keys; an entry of a list with a name is under its name."""
    if isinstance(value, Mapping) and value:
        return [leaf for name, part in value.items() for leaf in _flat(part, f"{key}.{name}" if key else str(name))]
    if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(p, Mapping) for p in value):
        named = [(p.get("name", n) if isinstance(p, Mapping) else n, p) for n, p in enumerate(value)]
        return [leaf for name, part in named for leaf in _flat(part, f"{key}.{name}")]
    return [(key, value)]
