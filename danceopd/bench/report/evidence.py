"""Drift, diversity and the judges of a bench as the report shows them: `scores.json` goes in, lines and sentences come
out. What was measured is in the evidence room; None where it was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danceopd.bench.evidence.second import PEOPLE
from danceopd.bench.report import facts
from danceopd.bench.report.thumbnails import Thumbnails

MEASURES = {
    "structure": ("structure: distance from the base", "↓", "1 − SSIM, 0 is equal, 1 the most"),
    "colour": ("colour: distance from the base", "↓", "of 8×8 thumbnails, 0 is equal, 1 the most"),
    "diversity": ("diversity at a fixed prompt", "↑", "distance between the seeds of one prompt, 0 to 1"),
}
SIDE = 256


def drift_lines(scores: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any] | None:
    """{sentence, lines, farthest} of `scores["drift"]`; its pictures become thumbnails."""
    found = scores.get("drift")
    if not found:
        return None
    lines = []
    for key, (name, better, meaning) in MEASURES.items():
        cells = {m["name"]: (found["models"].get(m["name"]) or {}).get(key) for m in scores["models"]}
        if any(cells.values()):
            lines.append({"name": name, "better": better, "meaning": meaning, "cells": cells})
    thumbnails.fetch([f[side] for f in found["farthest"] for side in ("base", "student")], SIDE)
    shown = [f | {"pictures": [thumbnails(f["base"]), thumbnails(f["student"])]} for f in found["farthest"]]
    return {"sentence": drift_sentence(scores, found), "lines": lines, "farthest": shown}


def drift_sentence(scores: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How far the student is from the base, beside the farthest teacher, and whether seeds became alike."""
    count, seeds = len(found["prompts"]), found["seeds"]
    text = f"On {count} prompts that no teacher is for, from {seeds} seeds each and the same noise for every model"
    student, base = facts.student_of(scores), facts.base_of(scores)

    def mean(name: str | None, key: str) -> float | None:
        return ((found["models"].get(name) or {}).get(key) or {}).get("mean") if name else None

    mine = mean(student["name"], "structure")
    if mine is not None:
        text += f", {student['label']} is {facts.number(mine)} from the base in structure"
        teachers = {m["label"]: mean(m["name"], "structure") for m in scores["models"] if m["role"] == "teacher"}
        known = {label: value for label, value in teachers.items() if value is not None}
        if known:
            farthest = max(known, key=lambda label: known[label])
            text += f"; the teacher that is farthest, {farthest}, is {facts.number(known[farthest])}"
    own, origin = mean(student["name"], "diversity"), mean(base, "diversity")
    if own is not None and origin:
        text += f". Its images of one prompt differ {facts.number(own / origin)} times as much as the base's"
    return f"{text}. None of this is a score."


def judges(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """{second, rows, people} of a bench with a judge; None without one."""
    if not scores.get("judge"):
        return None
    name, second = facts.judge_name(scores["judge"]), scores.get("second_judge")
    rows = _rows((scores.get("judging") or {}).get("agreement"), f"{name} with itself")
    shown = None
    if second:
        other = facts.judge_name(second.get("judge"))
        rows += _rows(second["agreement"], f"{name} and {other}")
        lines = []
        for c in facts.capabilities(scores):
            mine = {m["name"]: (m.get(c) or {}).get("overall") for m in scores["models"]}
            theirs = {model: of.get(c) for model, of in second["models"].items()}
            for who, cells in ((name, mine), (other, theirs)):
                cells = {m["name"]: cells.get(m["name"]) for m in scores["models"]}
                lines.append({"name": f"{c}: {who}", "better": "↑", "meaning": "", "cells": cells})
        shown = {"name": other, "same": second["same"], "verdict": second["verdict"], "lines": lines}
    people = PEOPLE.get(scores["suite"]["name"], "not known for this judge and suite")
    return {"second": shown, "rows": rows, "people": people}


def _rows(agreement: Any, who: str) -> list[dict[str, Any]]:
    """Agreement by aspect as rows of a table; what has no answers of both is left out."""
    found = []
    for aspect, of in (agreement if isinstance(agreement, Mapping) else {}).items():
        if isinstance(of, Mapping) and of.get("n"):
            figures = {key: _number(of.get(key)) for key in ("exact", "difference", "kappa")}
            found.append({"name": f"{who}: {aspect}", "n": of["n"]} | figures)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
