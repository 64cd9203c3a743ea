"""The interference matrix: what happened to each teacher's own categories, in the student and in everything else.

A category is a teacher's own where it is ahead of the base by more than noise: the paired 95 % interval lies above
zero and the gain is at least `compare.LEAST_GAP` of the scale, over at least `LEAST_ITEMS` items. Rows are those
categories, and each teacher's together; columns are the student, the blends, the other teachers. A cell is two paired
differences, against that teacher and against the base, and a verdict in a word. With many categories a few of the
verdicts are chance: an interval of 95 % is wrong once in twenty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from danceopd.bench import compare

LEAST_ITEMS = 6
"""With fewer, not even a win in every item is beyond chance (sign test)."""
VERDICTS = {
    "above": "better than the teacher",
    "kept": "not told apart from the teacher",
    "part": "below the teacher, above the base",
    "lost": "below the teacher, no better than the base",
    "harmed": "below the base",
}


def interference(
    rows: Sequence[dict],
    student: str,
    base: str | None,
    teachers: Sequence[str],
    others: Sequence[str] = (),
    share: Mapping[str, bool] | None = None,
    scale: Mapping[str, compare.Scale] | None = None,
) -> dict[str, Any] | None:
    """The matrix as plain JSON, or None without a base and a teacher. `others` are further columns (blends).

    `share` and `scale` are by capability, as a suite says them. {models, verdicts, teachers, categories, unowned}:
    `teachers`, a row a teacher and capability over all its own categories (`categories` names them); `categories`, a
    row a teacher and own category, `first` where it leads the others. A row has `gain` (the teacher minus the base)
    and `cells`, by model: {`teacher`, `base`: figures of `compare.difference` against each; `verdict`}. `unowned`:
    categories that are no teacher's, with `base` only in the cells.
    """
    teachers = [name for name in teachers if name != base]
    if base is None or not teachers:
        return None
    columns = [name for name in dict.fromkeys([student, *others, *teachers]) if name != base]
    found: dict[str, Any] = {"models": columns, "verdicts": VERDICTS, "teachers": [], "categories": [], "unowned": []}
    for capability in dict.fromkeys(row["capability"] for row in rows if compare.ordinary(row)):
        ends = (scale or {}).get(capability)
        width = compare.scale_of((share or {}).get(capability, capability == "generation"), ends)
        scores = {name: compare.scores_of(rows, name, capability) for name in (base, *columns)}
        owned: set[str] = set()
        for teacher in teachers:
            gains = compare.difference(scores[teacher], scores[base], width)
            own = [c for c, gain in (gains or {"categories": {}})["categories"].items() if _beyond_noise(gain, width)]
            if own:
                row = {"capability": capability, "teacher": teacher, "categories": own}
                found["teachers"].append(row | _row(scores, base, teacher, own, columns, width))
            for category in own:
                row = {"capability": capability, "category": category, "teacher": teacher}
                found["categories"].append(row | _row(scores, base, teacher, [category], columns, width))
            owned.update(own)
        _mark_first([row for row in found["categories"] if row["capability"] == capability])
        for category in scores[base]:
            if category not in owned:
                cells = {
                    name: {"base": figure}
                    for name in columns
                    if (figure := _difference(scores[name], scores[base], [category], width))
                }
                found["unowned"].append({"capability": capability, "category": category, "cells": cells})
    return found


def _mark_first(rows: Sequence[dict]) -> None:
    """Sets `first` where a teacher is further ahead of the base than any other that owns the category."""
    top: dict[str, float] = {}
    for row in rows:
        top[row["category"]] = max(top.get(row["category"], 0.0), row["gain"]["mean"])
    for row in rows:
        row["first"] = row["gain"]["mean"] == top[row["category"]]


def _beyond_noise(gain: dict, scale: compare.Scale) -> bool:
    least = compare.LEAST_GAP * (scale[1] - scale[0])
    return gain["n"] >= LEAST_ITEMS and gain["low"] > 0 and gain["mean"] >= least


def _difference(
    one: compare.Scores, other: compare.Scores, categories: Sequence[str], scale: compare.Scale
) -> dict | None:
    """One figure over some categories, without their own."""
    found = compare.difference({c: one[c] for c in categories if c in one}, other, scale)
    return found and {key: value for key, value in found.items() if key != "categories"}


def _row(
    scores: Mapping[str, compare.Scores],
    base: str,
    teacher: str,
    categories: Sequence[str],
    columns: Sequence[str],
    scale: compare.Scale,
) -> dict[str, Any]:
    """`gain` and `cells` of one row."""
    cells = {}
    for name in columns:
        if name == teacher:
            continue
        ahead = _difference(scores[name], scores[teacher], categories, scale)
        gained = _difference(scores[name], scores[base], categories, scale)
        if ahead and gained:
            cells[name] = {"teacher": ahead, "base": gained, "verdict": _verdict(ahead, gained)}
    return {"gain": _difference(scores[teacher], scores[base], categories, scale), "cells": cells}


def _verdict(teacher: dict, base: dict) -> str | None:
    """One of `VERDICTS`; None where nothing could be scored."""
    if teacher["mean"] is None or base["mean"] is None:
        return None
    if base["high"] < 0:
        return "harmed"
    if teacher["high"] >= 0:
        return "above" if teacher["low"] > 0 else "kept"
    return "part" if base["low"] > 0 else "lost"
