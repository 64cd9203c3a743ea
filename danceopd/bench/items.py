"""The items of a bench as the report shows them: every model's cell side by side, worst first.

An item's gains are paired: the student's score minus the base's, and minus that of the teacher which is best in the
item's category. Pictures are inlined until a budget is spent: the worst items of all first and larger, then each
category in turn with its next worst ones and, every fourth time, its best. Items beyond the budget stay in the
list, in words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from danceopd.bench import standing
from danceopd.bench.compare import in_subset

PAGE = 20
"""Items that are shown at once."""
LARGE, SMALL = 512, 256
"""Longest side in pixels of a thumbnail: of the worst items, of the others."""
RAW, REASON = 2000, 300
"""Characters of a raw answer and, where pictures are left out, of a reason that the page keeps."""


def items_of(scores: Mapping[str, Any], rows: Sequence[dict]) -> list[dict]:
    """One record an item, worst first: its words, every model's cell, the student's standing."""
    found: dict[tuple[str, str], dict] = {}
    keep = ("key", "capability", "category", "prompt", "source", "target", "probe")
    for row in rows:
        place = (row["capability"], row["key"])
        if place not in found:
            found[place] = {k: row.get(k) for k in keep} | {
                "cells": {},
                "number": len(found),
                "subsets": _subsets(scores, row),
                "heldout": bool(row.get("heldout")) or "held-out" in (row.get("probe") or ""),
            }
        found[place]["cells"][row["model"]] = _cell(row)
    student, base = standing.student_of(scores)["name"], standing.base_of(scores)
    for item in found.values():
        cells = item["cells"]
        mine = cells.get(student)
        low, span = standing.scale(scores, item["capability"])[0], standing.span(scores, item["capability"])
        teacher = standing.best_teacher(scores, item["capability"], item["category"])
        item["score"] = mine["score"] if mine else None
        item["wrong"] = bool(mine) and mine["status"] == "ok" and not mine["correct"]
        item["unscored"] = [name for name, cell in cells.items() if cell["status"] != "ok"]
        for key, name in (("teacher", teacher), ("base", base)):
            other = cells[name]["score"] if name in cells and name != student else None
            gain = None if item["score"] is None or other is None else item["score"] - other
            item[key] = {"name": name, "gain": gain, "part": None if gain is None else gain / span}
        item["part"] = None if item["score"] is None else (item["score"] - low) / span
    return sorted(found.values(), key=_worst_first)


def _subsets(scores: Mapping[str, Any], row: dict) -> list[str]:
    """The reported subsets that a row belongs to, and its own tags."""
    named = (scores["suite"].get("subsets") or {}).items()
    return list(dict.fromkeys([*(name for name, parts in named if in_subset(row, parts)), *(row.get("tags") or ())]))


def _cell(row: dict) -> dict:
    status = row.get("status") or ("ok" if row.get("score") is not None else "missing")
    return {
        "image": row.get("image"),
        "score": row.get("score") if status == "ok" else None,
        "status": status,
        "correct": bool(row.get("correct")),
        "reason": row.get("reason") or "",
        "aspects": [_aspect(name, found) for name, found in (row.get("judge") or {}).items()],
        "metrics": {k: v for k, v in (row.get("metrics") or {}).items() if isinstance(v, int | float)},
        "raw": _raw(row),
    }


def _aspect(name: str, found: Any) -> dict:
    """What a judge said about one aspect: its numbers or choice as words, and why."""
    found = found if isinstance(found, Mapping) else {"numbers": found}
    numbers, status = found.get("numbers"), found.get("status") or "ok"
    numbers = numbers if isinstance(numbers, list | tuple) else [] if numbers is None else [numbers]
    words = ", ".join(f"{n:g}" if isinstance(n, int | float) else str(n) for n in numbers)
    words = ", ".join(filter(None, [words, str(found.get("choice") or ""), "" if status == "ok" else str(status)]))
    return {"name": name, "numbers": words, "reasoning": str(found.get("reasoning") or "")}


def _raw(row: dict) -> str:
    """The text that a judge answered where it could not be used, or else the reason given."""
    texts = []
    for name, found in (row.get("judge") or {}).items():
        parts = [found, *(found.get("repeats") or ())] if isinstance(found, Mapping) else []
        seen = dict.fromkeys(str(p["text"]) for p in parts if isinstance(p, Mapping) and p.get("text"))
        texts += [f"{name}: {text}" for text in seen]
    return ("\n".join(texts) or str(row.get("text") or row.get("reason") or ""))[:RAW]


def _worst_first(item: dict) -> tuple:
    """Largest regression against the best teacher (else the base), then the lowest score; no score comes last."""
    gain = item["teacher"]["part"] if item["teacher"]["part"] is not None else item["base"]["part"]
    return (item["part"] is None, gain if gain is not None else 0.0, item["part"] or 0.0, item["number"])


def in_turn(items: Sequence[dict]) -> Iterator[dict]:
    """The order in which items get their pictures: the worst page, then the categories in turn."""
    yield from items[:PAGE]
    queues: dict[tuple, deque] = {}
    for item in items[PAGE:]:
        queues.setdefault((item["capability"], item["category"], item["probe"]), deque()).append(item)
    turn = 0
    while queues:
        for name in list(queues):
            yield queues[name].pop() if turn % 4 == 3 else queues[name].popleft()
            if not queues[name]:
                del queues[name]
        turn += 1


def give_pictures(items: Sequence[dict], fetch: Callable[[list[str], int], int], budget: int) -> int:
    """Sets `item["pictures"]` of those whose pictures fit into `budget` characters; returns how many do.

    `fetch(paths, side)` makes thumbnails of at most `side` pixels and returns their characters.
    """
    for item in items:
        item["pictures"] = False
    given = 0
    for item in in_turn(items):
        paths = [p for p in (item["source"], item["target"], *(c["image"] for c in item["cells"].values())) if p]
        budget -= fetch(paths, LARGE if given < PAGE else SMALL)
        if budget < 0 and given:
            break
        item["pictures"] = True
        given += 1
    return given


def failures(items: Sequence[dict]) -> list[dict]:
    """Every cell without a score: {item, model, status, raw}."""
    return [
        {"item": item, "model": name, "status": item["cells"][name]["status"], "raw": item["cells"][name]["raw"]}
        for item in sorted(items, key=lambda item: item["number"])
        for name in item["unscored"]
    ]
