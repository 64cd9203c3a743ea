"""How the student stands: what `scores.json` says about losses and gains, for the report and the tables beside it.

A category counts as lost when the student is below the base, or below the teacher that is best in that category,
and the whole 95 % interval of the paired difference is below zero; as gained when it is above zero against the
base. Everything is read from `scores.json`; a key that an older bench did not write reads as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CAPABILITIES = {"generation": "Generation", "editing": "Editing"}
SCALE = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
OVERALL = "overall"
SLIGHT = 0.01
"""A loss of less than this share of the scale is named as slight."""


def capabilities(scores: Mapping[str, Any]) -> list[str]:
    """What was measured, generation first."""
    return [c for c in CAPABILITIES if any(m.get(c) for m in scores["models"])]


def scale(scores: Mapping[str, Any], capability: str) -> tuple[float, float]:
    """The lowest and the highest score that an item can get."""
    low, high = (scores["suite"].get("scale") or {}).get(capability) or SCALE[capability]
    return float(low), float(high)


def is_share(scores: Mapping[str, Any], capability: str) -> bool:
    """Whether scores are 0 or 1."""
    return bool((scores["suite"].get("share") or {}).get(capability, capability == "generation"))


def measure(scores: Mapping[str, Any], capability: str) -> str:
    """What a score is, in words."""
    if is_share(scores, capability):
        return "share correct"
    low, high = scale(scores, capability)
    return f"score from {low:g} to {high:g}"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A score as it is printed: a real minus, no minus before zero, a dash where there is none."""
    if value is None or value != value:
        return "–"
    text = f"{value:{'+' if sign else ''}.{0 if abs(value) >= 1000 else digits}f}"
    zero = float(text) == 0
    return text.lstrip("+-") if zero else text.replace("-", "−")


def student_of(scores: Mapping[str, Any]) -> dict:
    """The entry of the model that all others are compared with."""
    models = scores["models"]
    named = [m for m in models if m["name"] == scores.get("student")]
    return next((m for m in [*named, *models] if m["role"] == "student"), (named or models)[0])


def base_of(scores: Mapping[str, Any]) -> str | None:
    """Name of the base, where it was benched."""
    return next((m["name"] for m in scores["models"] if m["role"] == "base"), None)


def label(scores: Mapping[str, Any], name: str) -> str:
    """A model's label."""
    return next((m["label"] for m in scores["models"] if m["name"] == name), name)


def rivals(scores: Mapping[str, Any]) -> list[str]:
    """Whom the student is held against in the summary: base, teachers and blend, or everybody where there are none."""
    others = {m["name"]: m["role"] for m in scores["models"] if m["name"] != student_of(scores)["name"]}
    return [name for name, role in others.items() if role in ("base", "teacher", "blend")] or list(others)


def best_teacher(scores: Mapping[str, Any], capability: str, category: str) -> str | None:
    """The teacher with the highest mean in a category; for a category nobody has a mean in, the best overall."""
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


def standings(scores: Mapping[str, Any], capability: str) -> list[dict]:
    """The student's paired differences, overall first and then by category.

    A row is {category, teacher, base, loss, gain}. `teacher` and `base` are {mean, low, high, against, …} or None,
    `loss` is the deeper of them that is certain, `gain` the one to the base where that is certain.
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
    for category in (OVERALL, *student[capability]["categories"]):  # best_teacher knows no "overall": the best of all
        best = (chosen.get(category) or {}).get("teacher") or best_teacher(scores, capability, category)
        teacher, base = difference(category, best), difference(category, base_of(scores))
        certain = [found for found in (teacher, base) if found and found["high"] < 0]
        loss = min(certain, key=lambda found: found["mean"]) if certain else None
        gain = base if base and base["low"] > 0 else None
        rows.append({"category": category, "teacher": teacher, "base": base, "loss": loss, "gain": gain})
    return rows


def _of_categories(scores: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    for capability in capabilities(scores):
        for row in standings(scores, capability):
            if row["category"] != OVERALL and (row["teacher"] or row["base"]):
                yield capability, row


def losses(scores: Mapping[str, Any]) -> list[dict]:
    """Categories lost for certain, the deepest first: {capability, category, against, mean, part, …}.

    `part` is the loss as a share of the scale.
    """
    found = [
        row["loss"] | {"capability": c, "category": row["category"], "part": row["loss"]["mean"] / span(scores, c)}
        for c, row in _of_categories(scores)
        if row["loss"]
    ]
    return sorted(found, key=lambda loss: loss["part"])


def verdict(scores: Mapping[str, Any]) -> dict:
    """{kind, sentence}: kind is lost, kept or unknown; the sentence says what was lost, where, and how sure that is."""
    seen = list(_of_categories(scores))
    if not seen:
        return {"kind": "unknown", "sentence": _without_rivals(scores)}
    lost = losses(scores)
    deep = [loss for loss in lost if loss["part"] <= -SLIGHT]
    slight = [f"{loss['category']} ({loss['capability']})" for loss in lost if loss["part"] > -SLIGHT]
    few = slight if len(slight) < 4 else [*slight[:3], f"{len(slight) - 3} more"]
    rest = f"; by less than {SLIGHT:.0%} of the scale in {_and(few)}".replace("%", " %") if slight else ""
    if deep:
        parts = [_where(loss["capability"], loss["category"], loss, scores) for loss in deep[:3]]
        if len(deep) > 3:
            parts.append(f"{len(deep) - 3} more")
        return {"kind": "lost", "sentence": f"The merge lost in {_of(len(deep), len(seen))}: {_and(parts)}{rest}."}
    capability, lowest = min(seen, key=lambda one: _nearest(one[1])["low"] / span(scores, one[0]))
    where = _where(capability, lowest["category"], _nearest(lowest), scores)
    return {
        "kind": "kept",
        "sentence": f"The merge lost nothing for certain in {_of(len(seen))}{rest}; the deepest loss that may be there "
        f"is {where}.",
    }


def _without_rivals(scores: Mapping[str, Any]) -> str:
    """The sentence where neither a base nor a teacher was benched."""
    parts = [
        _where(capability, OVERALL, delta | {"against": name}, scores)
        for capability in capabilities(scores)
        for name, delta in ((scores.get("comparison") or {}).get(capability) or {"deltas": {}})["deltas"].items()
        if name in rivals(scores) and delta.get("mean") is not None
    ]
    if not parts:
        return "The student was measured on its own, so nothing here says what it lost or gained."
    return f"There is no base and no teacher here to lose anything against; {_and(parts)}."


def _of(count: int, all_of: int | None = None) -> str:
    many = count if all_of is None else all_of
    return f"{count}{'' if all_of is None else f' of {all_of}'} {'category' if many == 1 else 'categories'}"


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def span(scores: Mapping[str, Any], capability: str) -> float:
    """How wide the scale is."""
    low, high = scale(scores, capability)
    return (high - low) or 1.0


def _nearest(row: dict) -> dict:
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
    """Where the student stands as a whole, one clause a capability."""
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
    """Models with pictures that have no score: {name, label, failed, mean, lower, upper, n}."""
    found = []
    for model in scores["models"]:
        overall = (model.get(capability) or {}).get("overall") or {}
        if overall.get("failed"):
            kept = {key: overall.get(key) for key in ("failed", "mean", "lower", "upper", "n")}
            found.append({"name": model["name"], "label": model["label"]} | kept)
    return found


def lines(scores: Mapping[str, Any], capability: str, digits: int = 2) -> list[dict]:
    """A table of means: {name, cells: model -> figure or None, best}, a line a category and one overall.

    `best` names the models whose mean is the highest as it is printed with so many digits.
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
    """The subsets that the suite reports: {name, cells}."""
    return [
        _line(scores, f"{capability}: {name}", figures)
        for name, by_capability in (scores.get("subsets") or {}).items()
        for capability, figures in by_capability.items()
    ]


def apart(scores: Mapping[str, Any]) -> list[dict]:
    """What counts in no overall score: held-out items beside the ordinary ones of their categories, and probes."""
    found = []
    for capability, comparison in (scores.get("comparison") or {}).items():
        models = ((comparison or {}).get("heldout") or {}).get("models") or {}
        for key, words in (("heldout", "held out"), ("seen", "seen, the same categories"), ("drop", "drop")):
            if any(m.get(key) for m in models.values()):
                found.append(_line(scores, f"{capability}: {words}", {n: m.get(key) for n, m in models.items()}))
    for name, probe in (scores.get("probes") or {}).items():
        found.append(_line(scores, f"{probe['capability']}: {name}", probe["models"]))
    return found


def metrics(scores: Mapping[str, Any]) -> list[dict]:
    """Judge-free metrics: {name, cells}."""
    return [
        _line(scores, f"{capability}: {name}", {model: found.get(name) for model, found in by_model.items()})
        for capability, by_model in (scores.get("metrics") or {}).items()
        for name in dict.fromkeys(name for found in by_model.values() for name in found)
    ]


SETS = {"near_duplicates": "near-duplicates (share)", "constant": "one colour only (share)"}


def sets(scores: Mapping[str, Any]) -> list[dict]:
    """What each model's pictures are as a set: {name, cells}, shares without an interval."""
    found = {m: s for m, s in (scores.get("pictures") or {}).items() if isinstance(s, Mapping)}
    return [
        _line(scores, words, {m: {"mean": s[key], "n": s.get("n")} for m, s in found.items() if s.get(key) is not None})
        for key, words in SETS.items()
        if any(s.get(key) is not None for s in found.values())
    ]
