"""The items of a bench as the report lists them: rows go in, one record for each item comes out, worst first.

A record has every model's cell, and the student's gain: its score minus the base's, and minus that of the teacher that
is best in the item's category. The best, a typical and the worst item of each capability stand on the first tab
(`highlights`). Images are embedded until a budget is spent: the worst items of all first and larger,
then the categories in turn with their next worst items and, every fourth time, their best. Items beyond the budget
stay in the list without images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from danceopd.bench.metrics.names import words_of
from danceopd.bench.report import facts
from danceopd.bench.statistics import in_subset

PAGE = 20
"""Items on a page."""
LARGE, SMALL = 512, 256
"""Longest side of a thumbnail in pixels: for the worst items, for the others."""
RAW, REASON = 2000, 300
"""Characters kept of a raw answer and, for items without images, of a reason."""


def items_of(scores: Mapping[str, Any], rows: Sequence[dict]) -> list[dict]:
    """One record for each item, worst first: its prompt, every model's cell, the student's gains."""
    found: dict[tuple[str, str, str], dict] = {}
    keep = ("key", "capability", "category", "prompt", "source", "target", "probe")
    for row in rows:
        place = (row["capability"], row["category"], row["key"])
        if place not in found:
            found[place] = {k: row.get(k) for k in keep} | {
                "cells": {},
                "number": len(found),
                "subsets": _subsets(scores, row),
                "heldout": bool(row.get("heldout")) or "held-out" in (row.get("probe") or ""),
            }
        found[place]["cells"][row["model"]] = _cell(row)
    student, base = facts.student_of(scores)["name"], facts.base_of(scores)
    for item in found.values():
        cells = item["cells"]
        mine = cells.get(student)
        low, span = facts.scale(scores, item["capability"])[0], facts.span(scores, item["capability"])
        teacher = facts.best_teacher(scores, item["capability"], item["category"])
        is_share = facts.is_share(scores, item["capability"])
        item["score"] = mine["score"] if mine else None
        for cell in cells.values():
            cell["share"] = None if cell["score"] is None else (cell["score"] - low) / span
            cell["right"] = cell["correct"] if is_share else (cell["share"] or 0.0) >= 0.5
        item["wrong"] = mine is not None and mine["share"] is not None and not mine["right"]
        item["unscored"] = [name for name, cell in cells.items() if cell["status"] != "ok"]
        for key, name in (("teacher", teacher), ("base", base)):
            other = cells[name]["score"] if name in cells and name != student else None
            gain = None if item["score"] is None or other is None else item["score"] - other
            item[key] = {"name": name, "gain": gain, "share": None if gain is None else gain / span}
        item["share"] = mine["share"] if mine else None
    return sorted(found.values(), key=_worst_first)


def highlights(scores: Mapping[str, Any], items: Sequence[dict]) -> dict[str, list[tuple[str, dict]]]:
    """Capability -> the best, a typical and the worst ordinary item of those that the student has a scored image of."""
    student = facts.student_of(scores)["name"]
    found: dict[str, list[tuple[str, dict]]] = {}
    for capability in facts.capabilities(scores):
        kept = [
            item
            for item in items
            if item["capability"] == capability and item["share"] is not None and item["cells"][student]["image"]
            and not item["probe"] and not item["heldout"]
        ]  # fmt: skip
        places = {"best": -1, "typical": len(kept) // 2, "worst": 0} if len(kept) > 2 else {}
        if places:
            found[capability] = [(word, kept[at]) for word, at in places.items()]
    return found


def _subsets(scores: Mapping[str, Any], row: dict) -> list[str]:
    """The suite's subsets that a row belongs to, and its own tags."""
    named = (scores["suite"].get("subsets") or {}).items()
    return list(dict.fromkeys([*(name for name, parts in named if in_subset(row, parts)), *(row.get("tags") or ())]))


def _cell(row: dict) -> dict:
    status = row.get("status") or ("ok" if row.get("score") is not None else "missing")
    parts, aspects = row.get("parts") or {}, [_aspect(name, found) for name, found in (row.get("judge") or {}).items()]
    return {
        "image": row.get("image"),
        "score": row.get("score") if status == "ok" else None,
        "status": status,
        "correct": bool(row.get("correct")),
        "parts": {name.upper(): v for name in ("sc", "pq") if isinstance(v := parts.get(name), int | float)},
        "reason": "" if any(a["reasoning"] for a in aspects) else row.get("reason") or "",  # each reason once
        "aspects": aspects,
        "metrics": {words_of(k).name: v for k, v in (row.get("metrics") or {}).items() if isinstance(v, int | float)},
        "raw": _raw(row),
    }


def _aspect(name: str, found: Any) -> dict:
    """A judge's answer to one aspect: its numbers or choice as text, and its reasoning."""
    found = found if isinstance(found, Mapping) else {"numbers": found}
    numbers, status = found.get("numbers"), found.get("status") or "ok"
    numbers = numbers if isinstance(numbers, list | tuple) else [] if numbers is None else [numbers]
    words = ", ".join(f"{n:g}" if isinstance(n, int | float) else str(n) for n in numbers)
    words = ", ".join(filter(None, [words, str(found.get("choice") or ""), "" if status == "ok" else str(status)]))
    return {"name": name, "numbers": words, "reasoning": str(found.get("reasoning") or "")}


def _raw(row: dict) -> str:
    """The raw text of a judge's unusable answers, or else the row's reason."""
    texts = []
    for name, found in (row.get("judge") or {}).items():
        repeats = found.get("repeats") if isinstance(found, Mapping) else None
        parts = [found, *(repeats if isinstance(repeats, list) else ())]
        seen = dict.fromkeys(str(p["text"]) for p in parts if isinstance(p, Mapping) and p.get("text"))
        texts += [f"{name}: {text}" for text in seen]
    return ("\n".join(texts) or str(row.get("text") or row.get("reason") or ""))[:RAW]


def _worst_first(item: dict) -> tuple:
    """Sorting key: largest regression against the best teacher (else the base), then lowest score; no score last."""
    gain = item["teacher"]["share"] if item["teacher"]["share"] is not None else item["base"]["share"]
    return (item["share"] is None, gain if gain is not None else 0.0, item["share"] or 0.0, item["number"])


def image_order(items: Sequence[dict]) -> Iterator[dict]:
    """The order in which items get their images: the first page, then the categories in turn."""
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


def embed_images(
    items: Sequence[dict], fetch: Callable[[list[str], int], int], budget: int, twice: Sequence[dict] = ()
) -> int:
    """Sets `item["images"]` of the items whose images fit into `budget` characters; returns how many do.

    `fetch(paths, side)` makes thumbnails of at most `side` pixels and returns their characters. `twice`: items that
    stand on the first tab as well, whatever the budget.
    """
    for item in items:
        item["images"] = False
    embedded = 0
    budget -= sum(fetch(_paths(item), LARGE) for item in twice)
    for item in image_order(items):
        budget -= fetch(_paths(item), LARGE if embedded < PAGE else SMALL)
        if budget < 0 and embedded:
            break
        item["images"] = True
        embedded += 1
    return embedded


def _paths(item: Mapping[str, Any]) -> list[str]:
    return [p for p in (item["source"], item["target"], *(c["image"] for c in item["cells"].values())) if p]


def failures(items: Sequence[dict]) -> list[dict]:
    """Every image without a score: {item, model, status, raw}."""
    return [
        {"item": item, "model": name, "status": item["cells"][name]["status"], "raw": item["cells"][name]["raw"]}
        for item in sorted(items, key=lambda item: item["number"])
        for name in item["unscored"]
    ]
