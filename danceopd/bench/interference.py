"""The interference matrix: what the student, the blends and the other teachers kept of each teacher's strengths.

A category is a teacher's own if the teacher is significantly ahead of the base there: the 95 % interval of the paired
difference is above zero, and the gain at least `statistics.LEAST_GAP` of the scale, over `LEAST_ITEMS` items or more.
Rows are those categories, and all of a teacher's together; columns are the student, the blends, the other teachers. A
cell has two paired differences, against that teacher and against the base, and a verdict. With many categories a few
verdicts are due to chance: a 95 % interval is wrong once in twenty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from danceopd.bench import statistics

LEAST_ITEMS = 6
"""With fewer, not even a win in every item is significant (sign test)."""
VERDICTS = {
    "above": "better than the teacher",
    "kept": "no significant difference from the teacher",
    "part": "worse than the teacher, better than the base",
    "lost": "worse than the teacher, no better than the base",
    "harmed": "worse than the base",
}
"""A cell's verdict, as scores.json has it -> what reports print."""


def interference(
    rows: Sequence[dict],
    student: str,
    base: str | None,
    teachers: Sequence[str],
    others: Sequence[str] = (),
    share: Mapping[str, bool] | None = None,
    scale: Mapping[str, statistics.Scale] | None = None,
) -> dict[str, Any] | None:
    """The matrix as plain JSON, or None without a base and a teacher. `others` are further columns (blends).

    `share` and `scale` are those of the suite, by capability. {models, verdicts, teachers, categories, unowned}:
    `teachers` has a row for each teacher and capability, over all its own categories (`categories` names them);
    `categories` a row for each teacher and own category, `first` if it is ahead of the others there. A row has `gain`
    (the teacher minus the base) and `cells`, by model: {`teacher`, `base`: figures of `statistics.difference` against
    each; `verdict`}. `unowned`: categories of no teacher, with `base` only in the cells.
    """
    teachers = [name for name in teachers if name != base]
    if base is None or not teachers:
        return None
    columns = [name for name in dict.fromkeys([student, *others, *teachers]) if name != base]
    found: dict[str, Any] = {"models": columns, "verdicts": VERDICTS, "teachers": [], "categories": [], "unowned": []}
    for capability in dict.fromkeys(row["capability"] for row in rows if statistics.ordinary(row)):
        ends = (scale or {}).get(capability)
        width = statistics.scale_of((share or {}).get(capability, capability == "generation"), ends)
        scores = {name: statistics.scores_of(rows, name, capability) for name in (base, *columns)}
        owned: set[str] = set()
        for teacher in teachers:
            gains = statistics.difference(scores[teacher], scores[base], width)
            own = [c for c, gain in (gains or {"categories": {}})["categories"].items() if _significant(gain, width)]
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
    """Sets `first` in the row of the teacher that is furthest ahead of the base in a category."""
    top: dict[str, float] = {}
    for row in rows:
        top[row["category"]] = max(top.get(row["category"], 0.0), row["gain"]["mean"])
    for row in rows:
        row["first"] = row["gain"]["mean"] == top[row["category"]]


def _significant(gain: dict, scale: statistics.Scale) -> bool:
    least = statistics.LEAST_GAP * (scale[1] - scale[0])
    return gain["n"] >= LEAST_ITEMS and gain["low"] > 0 and gain["mean"] >= least


def _difference(
    one: statistics.Scores, other: statistics.Scores, categories: Sequence[str], scale: statistics.Scale
) -> dict | None:
    """The figure over some categories, without those by category."""
    found = statistics.difference({c: one[c] for c in categories if c in one}, other, scale)
    return found and {key: value for key, value in found.items() if key != "categories"}


def _row(
    scores: Mapping[str, statistics.Scores],
    base: str,
    teacher: str,
    categories: Sequence[str],
    columns: Sequence[str],
    scale: statistics.Scale,
) -> dict[str, Any]:
    """The `gain` and the `cells` of one row."""
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
    """One of `VERDICTS`; None where nothing was scored."""
    if teacher["mean"] is None or base["mean"] is None:
        return None
    if base["high"] < 0:
        return "harmed"
    if teacher["high"] >= 0:
        return "above" if teacher["low"] > 0 else "kept"
    return "part" if base["low"] > 0 else "lost"
