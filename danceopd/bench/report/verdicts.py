"""What the student lost and gained: `scores.json` goes in, sentences and rows for the report and the tables come out.

A loss in a category is significant if the 95 % interval of the paired difference from the base, or from the teacher
that is best in that category, is entirely below zero; a gain, if the interval of the difference from the base is above
zero. Losses within `MARGIN` of the scale are named apart. Everything is read from `scores.json`; a key that an older
bench did not write counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CAPABILITIES = {"generation": "Generation", "editing": "Editing"}
SCALE = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
OVERALL = "overall"
MARGIN = 0.01
"""A significant loss of less than this share of the scale counts as within the margin."""


def capabilities(scores: Mapping[str, Any]) -> list[str]:
    """The capabilities that were measured, generation first."""
    return [c for c in CAPABILITIES if any(m.get(c) for m in scores["models"])]


def scale(scores: Mapping[str, Any], capability: str) -> tuple[float, float]:
    """The lowest and the highest possible score of an item."""
    low, high = (scores["suite"].get("scale") or {}).get(capability) or SCALE[capability]
    return float(low), float(high)


def is_share(scores: Mapping[str, Any], capability: str) -> bool:
    """Whether scores are 0 or 1, so that a mean is a share."""
    return bool((scores["suite"].get("share") or {}).get(capability, capability == "generation"))


def measure(scores: Mapping[str, Any], capability: str) -> str:
    """The unit of a score, in words."""
    if is_share(scores, capability):
        return "share correct"
    low, high = scale(scores, capability)
    return f"score from {low:g} to {high:g}"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A score as text: a typographic minus, no sign before zero, a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    text = f"{value:{'+' if sign else ''}.{0 if abs(value) >= 1000 else digits}f}"
    zero = float(text) == 0
    return text.lstrip("+-") if zero else text.replace("-", "−")


def student_of(scores: Mapping[str, Any]) -> dict:
    """The entry of the student, the model that all others are compared with."""
    models = scores["models"]
    named = [m for m in models if m["name"] == scores.get("student")]
    return next((m for m in [*named, *models] if m["role"] == "student"), (named or models)[0])


def base_of(scores: Mapping[str, Any]) -> str | None:
    """The name of the base, None where it was not part of the bench."""
    return next((m["name"] for m in scores["models"] if m["role"] == "base"), None)


def label(scores: Mapping[str, Any], name: str) -> str:
    """The label of a model's name."""
    return next((m["label"] for m in scores["models"] if m["name"] == name), name)


def references(scores: Mapping[str, Any]) -> list[str]:
    """The models that the summary compares the student with: base, teachers and blend; without them, all others."""
    others = {m["name"]: m["role"] for m in scores["models"] if m["name"] != student_of(scores)["name"]}
    return [name for name, role in others.items() if role in ("base", "teacher", "blend")] or list(others)


def best_teacher(scores: Mapping[str, Any], capability: str, category: str) -> str | None:
    """The teacher with the highest mean in a category; the best overall where no teacher has a mean in it."""
    means = {
        m["name"]: m[capability]["categories"][category]["mean"]
        for m in scores["models"]
        if m["role"] == "teacher"
        and m.get(capability)
        and m[capability]["categories"].get(category, {}).get("mean") is not None
    }
    if means:
        return max(means, key=lambda name: means[name])
    return ((scores.get("comparison") or {}).get(capability) or {}).get("best_teacher")


def student_differences(scores: Mapping[str, Any], capability: str) -> list[dict]:
    """The student's paired differences from the best teacher and from the base, overall first, then by category.

    A row is {category, teacher, base, loss, gain}. `teacher` and `base` are {mean, low, high, against, …} or None;
    `loss` is the larger significant loss of the two, `gain` the significant gain over the base, each or None.
    """
    comparison, student = (scores.get("comparison") or {}).get(capability), student_of(scores)
    if not comparison or not student.get(capability):
        return []
    chosen = comparison.get("against_best") or {}

    def difference(category: str, name: str | None) -> dict | None:
        found = comparison["deltas"].get(name) if name else None
        if found and category != OVERALL:
            found = found["categories"].get(category)
        if not found or any(found.get(key) is None for key in ("mean", "low", "high")):
            return None
        return found | {"against": name}

    rows = []
    for category in (OVERALL, *student[capability]["categories"]):  # best_teacher has no "overall": the best of all
        best = (chosen.get(category) or {}).get("teacher") or best_teacher(scores, capability, category)
        teacher, base = difference(category, best), difference(category, base_of(scores))
        lower = [found for found in (teacher, base) if found and found["high"] < 0]
        loss = min(lower, key=lambda found: found["mean"]) if lower else None
        gain = base if base and base["low"] > 0 else None
        rows.append({"category": category, "teacher": teacher, "base": base, "loss": loss, "gain": gain})
    return rows


def _category_rows(scores: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    """(capability, row of `student_differences`) of every category with a difference."""
    for capability in capabilities(scores):
        for row in student_differences(scores, capability):
            if row["category"] != OVERALL and (row["teacher"] or row["base"]):
                yield capability, row


def losses(scores: Mapping[str, Any]) -> list[dict]:
    """The categories with a significant loss, the largest first: {capability, category, against, mean, share, …}.

    `share` is the loss as a share of the scale.
    """
    found = [
        row["loss"] | {"capability": c, "category": row["category"], "share": row["loss"]["mean"] / span(scores, c)}
        for c, row in _category_rows(scores)
        if row["loss"]
    ]
    return sorted(found, key=lambda loss: loss["share"])


def verdict(scores: Mapping[str, Any]) -> dict:
    """{kind, sentence}: kind is lost, kept or unknown; the sentence says where the student got worse, and by how much.

    Without a significant loss it names the category whose interval reaches lowest: the largest loss that the data
    do not rule out.
    """
    rows = list(_category_rows(scores))
    if not rows:
        return {"kind": "unknown", "sentence": _without_references(scores)}
    lost = losses(scores)
    large = [loss for loss in lost if loss["share"] <= -MARGIN]
    small = [f"{loss['category']} ({loss['capability']})" for loss in lost if loss["share"] > -MARGIN]
    few = small if len(small) < 4 else [*small[:3], f"{len(small) - 3} more"]
    margin = f"the margin of {100 * MARGIN:g} % of the scale"
    if large:
        parts = [_where(loss["capability"], loss["category"], loss, scores) for loss in large[:3]]
        if len(large) > 3:
            parts.append(f"{len(large) - 3} more")
        rest = f"; by less than {margin} also in {_and(few)}" if small else ""
        where = f"{_of(len(large), len(rows))} (95 % intervals)"
        sentence = f"The student is significantly worse in {where}: {_and(parts)}{rest}."
        return {"kind": "lost", "sentence": sentence}
    capability, lowest = min(rows, key=lambda row: _lowest(row[1])["low"] / span(scores, row[0]))
    where = _where(capability, lowest["category"], _lowest(lowest), scores)
    worse = f"not significantly worse in any category ({len(rows)} compared, 95 % intervals)"
    if small:
        some = f"{_of(len(small), len(rows))} (95 % intervals)"
        worse = f"significantly worse in {some}, by less than {margin}: {_and(few)}"
    sentence = f"The student is {worse}; the interval that reaches lowest is {where}."
    return {"kind": "kept", "sentence": sentence}


def _without_references(scores: Mapping[str, Any]) -> str:
    """The sentence for a bench without a base and without teachers."""
    parts = [
        _where(capability, OVERALL, delta | {"against": name}, scores)
        for capability in capabilities(scores)
        for name, delta in ((scores.get("comparison") or {}).get(capability) or {"deltas": {}})["deltas"].items()
        if name in references(scores) and delta.get("mean") is not None
    ]
    if not parts:
        return "The student was measured alone, without a base or a teacher to compare it with."
    return f"There is no base and no teacher to compare with; {_and(parts)}."


def _of(count: int, total: int) -> str:
    return f"{count} of {total} {'category' if total == 1 else 'categories'}"


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def span(scores: Mapping[str, Any], capability: str) -> float:
    """The width of the scale."""
    low, high = scale(scores, capability)
    return (high - low) or 1.0


def _lowest(row: dict) -> dict:
    """The difference of a row whose interval reaches lowest."""
    return min((row[key] for key in ("teacher", "base") if row[key]), key=lambda found: found["low"])


def _where(capability: str, category: str, found: dict, scores: Mapping[str, Any]) -> str:
    interval = f"{number(found['low'], sign=True)} to {number(found['high'], sign=True)}"
    both = f" ({capability})" if len(capabilities(scores)) > 1 else ""
    return f"{category}{both} {number(found['mean'], sign=True)} [{interval}] against {_who(scores, found['against'])}"


def _who(scores: Mapping[str, Any], name: str) -> str:
    role = next((m["role"] for m in scores["models"] if m["name"] == name), "")
    return "the base" if role == "base" else f"{f'{role} ' if role == 'teacher' else ''}{label(scores, name)}"


def overall_sentence(scores: Mapping[str, Any]) -> str:
    """The student's overall scores, one clause for each capability."""
    clauses = []
    for capability in capabilities(scores):
        mine = student_of(scores).get(capability)
        if not mine:
            continue
        found = (scores.get("comparison") or {}).get(capability) or {"deltas": {}, "best_teacher": None}
        named = [name for name in (base_of(scores), found["best_teacher"]) if name and name in found["deltas"]]
        parts = [f"{number(found['deltas'][n]['mean'], sign=True)} against {_who(scores, n)}" for n in named]
        gap = found.get("gap_closed")
        if gap and gap["share"] is not None:
            parts.append(f"{100 * gap['share']:.0f} % of the gap closed")
        clauses.append(f"{capability} {number(mine['overall']['mean'])}" + (f" ({', '.join(parts)})" if parts else ""))
    return f"Overall: {'; '.join(clauses)}."


def unscored(scores: Mapping[str, Any], capability: str) -> list[dict]:
    """Models with images that have no score: {name, label, failed, mean, lower, upper, n}."""
    found = []
    for model in scores["models"]:
        overall = (model.get(capability) or {}).get("overall") or {}
        if overall.get("failed"):
            kept = {key: overall.get(key) for key in ("failed", "mean", "lower", "upper", "n")}
            found.append({"name": model["name"], "label": model["label"]} | kept)
    return found


def score_table(scores: Mapping[str, Any], capability: str, digits: int = 2) -> list[dict]:
    """A table of means, a line for each category and one overall: {name, cells: model -> figure or None, best}.

    `best` names the models with the highest mean when it is printed with so many digits.
    """
    models = [m for m in scores["models"] if m.get(capability)]
    names = dict.fromkeys(c for m in models for c in m[capability]["categories"])
    found = []
    for name in (*names, OVERALL):
        cells = {
            m["name"]: m[capability]["overall"] if name == OVERALL else m[capability]["categories"].get(name)
            for m in models
        }
        means = {m: round(v["mean"], digits) for m, v in cells.items() if v and v.get("mean") is not None}
        top = max(means.values(), default=None)
        found.append({"name": name, "cells": cells, "best": {m for m, mean in means.items() if mean == top}})
    return found


def _line(scores: Mapping[str, Any], name: str, figures: Mapping[str, Any]) -> dict:
    return {"name": name, "cells": {m["name"]: figures.get(m["name"]) for m in scores["models"]}}


def subsets(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of the suite's subsets: {name, cells}."""
    return [
        _line(scores, f"{capability}: {name}", figures)
        for name, by_capability in (scores.get("subsets") or {}).items()
        for capability, figures in by_capability.items()
    ]


def separate(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of what counts in no overall score: held-out items (and ordinary ones beside them), and probes."""
    found = []
    for capability, comparison in (scores.get("comparison") or {}).items():
        models = ((comparison or {}).get("heldout") or {}).get("models") or {}
        for key, words in (
            ("heldout", "held-out items"),
            ("seen", "ordinary items, the same categories"),
            ("drop", "held out minus ordinary"),
        ):
            if any(m.get(key) for m in models.values()):
                found.append(_line(scores, f"{capability}: {words}", {n: m.get(key) for n, m in models.items()}))
    for name, probe in (scores.get("probes") or {}).items():
        found.append(_line(scores, f"{probe['capability']}: {name}", probe["models"]))
    return found


def metrics(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of the judge-free metrics: {name, cells}."""
    return [
        _line(scores, f"{capability}: {name}", {model: found.get(name) for model, found in by_model.items()})
        for capability, by_model in (scores.get("metrics") or {}).items()
        for name in dict.fromkeys(name for found in by_model.values() for name in found)
    ]


SETS = {"near_duplicates": "near-duplicates (share)", "constant": "images of one colour (share)"}


def image_sets(scores: Mapping[str, Any]) -> list[dict]:
    """The lines about all images of a model: {name, cells}, shares without an interval."""
    found = {m: s for m, s in (scores.get("pictures") or {}).items() if isinstance(s, Mapping)}
    return [
        _line(scores, words, {m: {"mean": s[key], "n": s.get("n")} for m, s in found.items() if s.get(key) is not None})
        for key, words in SETS.items()
        if any(s.get(key) is not None for s in found.values())
    ]
