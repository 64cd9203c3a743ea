"""The figures of a bench as rows and words: `scores.json` goes in, lines for the report and the tables come out.

A loss in a category is significant if the 95 % interval of the paired difference from the base, or from the teacher
that is best in that category, is entirely below zero; a gain, if the interval of the difference from the base is above
zero. What all of them together mean is said by verdict.py. A key that an older bench did not write counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from danceopd.bench.metrics.names import words_of

CAPABILITIES = {"generation": "Generation", "editing": "Editing"}
SCALE = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
OVERALL, ALL_RIGHT = "overall", "all facts right"


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


def exact_of(scores: Mapping[str, Any], capability: str) -> dict[str, Any] | None:
    """`scores` with the share of items that have all facts right in place of a capability's scores.

    None where the suite has no such share.
    """
    if not any((model.get(capability) or {}).get("exact") for model in scores["models"]):
        return None

    def part(of: Mapping[str, Any] | None) -> dict[str, Any]:
        return {capability: ((of or {}).get(capability) or {}).get("exact")}

    no_other = dict.fromkeys(CAPABILITIES)
    return {
        **scores,
        "suite": {**scores["suite"], "scale": {capability: (0.0, 1.0)}, "share": {capability: True}},
        "models": [{**model, **no_other, **part(model)} for model in scores["models"]],
        "comparison": part(scores.get("comparison")),
        "ceiling": part(scores.get("ceiling")),
        "measure": f"share with {ALL_RIGHT}",
    }


def measures(scores: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Name -> (scores, capability) of all that is measured: each capability, and its share with all facts right."""
    found: dict[str, tuple[Mapping[str, Any], str]] = {}
    for capability in capabilities(scores):
        found[capability] = (scores, capability)
        if exact := exact_of(scores, capability):
            found[f"{capability}, {ALL_RIGHT}"] = (exact, capability)
    return found


def measure(scores: Mapping[str, Any], capability: str) -> str:
    """The unit of a score, in words."""
    if scores.get("measure"):
        return str(scores["measure"])
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


def score(figure: Mapping[str, Any]) -> str | None:
    """A mean with its interval and the items without a score, as text; None where nothing has a score."""
    if figure.get("mean") is None:
        return None
    failed = f", {figure['failed']} without a score" if figure.get("failed") else ""
    return f"{number(figure['mean'])} [{number(figure['low'])} to {number(figure['high'])}]{failed}"


def judge_name(judge: Any) -> str:
    """The name of a judge, from its identity; "" without one."""
    if not isinstance(judge, Mapping):
        return str(judge or "")
    return str(next((judge[key] for key in ("name", "model", "kind") if judge.get(key)), "a judge"))


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


def differences_from_references(scores: Mapping[str, Any], capability: str) -> Iterator[tuple[str, str, dict]]:
    """(category, model, figure) of the student minus the best teacher, and minus the base: overall, then by category.

    A figure's mean is None where no item has a score of both.
    """
    comparison, student = (scores.get("comparison") or {}).get(capability), student_of(scores)
    if not comparison or not student.get(capability):
        return
    chosen = comparison.get("against_best") or {}
    for category in (OVERALL, *student[capability]["categories"]):  # best_teacher has no "overall": the best of all
        best = (chosen.get(category) or {}).get("teacher") or best_teacher(scores, capability, category)
        for name in dict.fromkeys((best, base_of(scores))):
            found = comparison["deltas"].get(name) if name else None
            if found and category != OVERALL:
                found = found["categories"].get(category)
            if name and found:
                yield category, name, found


def student_differences(scores: Mapping[str, Any], capability: str) -> list[dict]:
    """The student's paired differences from the best teacher and from the base, overall first, then by category.

    A row is {category, teacher, base, loss, gain}. `teacher` and `base` are {mean, low, high, against, …} or None;
    `loss` is the larger significant loss of the two, `gain` the significant gain over the base, each or None.
    """
    rows: dict[str, dict] = {}
    for category, name, figure in differences_from_references(scores, capability):
        row = rows.setdefault(category, {"category": category, "teacher": None, "base": None})
        if all(figure.get(key) is not None for key in ("mean", "low", "high")):
            row["base" if name == base_of(scores) else "teacher"] = figure | {"against": name}
    for row in rows.values():
        teacher, base = row["teacher"], row["base"]
        lower = [found for found in (teacher, base) if found and found["high"] < 0]
        row["loss"] = min(lower, key=lambda found: found["mean"]) if lower else None
        row["gain"] = base if base and base["low"] > 0 else None
    return list(rows.values())


def listed(parts: Sequence[str]) -> str:
    """"a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def span(scores: Mapping[str, Any], capability: str) -> float:
    """The width of the scale."""
    low, high = scale(scores, capability)
    return (high - low) or 1.0


def who(scores: Mapping[str, Any], name: str) -> str:
    """A model in a sentence: "the base", "teacher editing", or its label."""
    role = next((m["role"] for m in scores["models"] if m["name"] == name), "")
    return "the base" if role == "base" else f"{f'{role} ' if role == 'teacher' else ''}{label(scores, name)}"


def overall_sentence(scores: Mapping[str, Any]) -> str:
    """The student's overall scores, one clause for each measure."""
    clauses = []
    for measured, (of, capability) in measures(scores).items():
        mine = student_of(of).get(capability)
        if not mine:
            continue
        found = (of.get("comparison") or {}).get(capability) or {"deltas": {}, "best_teacher": None}
        named = [name for name in (base_of(scores), found["best_teacher"]) if name and name in found["deltas"]]
        parts = [f"{number(found['deltas'][n]['mean'], sign=True)} against {who(scores, n)}" for n in named]
        gap = found.get("gap_closed")
        if gap and gap["share"] is not None:
            parts.append(f"{100 * gap['share']:.0f} % of the gap closed")
        clauses.append(f"{measured} {number(mine['overall']['mean'])}" + (f" ({', '.join(parts)})" if parts else ""))
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
    """A table of means, a line for each category and one overall: {name, count, cells: model -> figure or None, best}.

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
        count = max((v["n"] + (v.get("failed") or 0) for v in cells.values() if v), default=0)
        best = {m for m, mean in means.items() if mean == top}
        found.append({"name": name, "count": count, "cells": cells, "best": best})
    return found


def _line(scores: Mapping[str, Any], name: str, figures: Mapping[str, Any]) -> dict:
    cells = {m["name"]: figures.get(m["name"]) for m in scores["models"]}
    return {"name": name, "better": "", "meaning": "", "cells": cells}


def subsets(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of the suite's subsets: {name, better, meaning, cells}."""
    return [
        _line(scores, f"{capability}: {name}", figures)
        for name, by_capability in (scores.get("subsets") or {}).items()
        for capability, figures in by_capability.items()
    ]


def separate(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of what counts in no overall score: held-out items (and ordinary ones beside them), and probes."""
    found = []
    for measured, (of, capability) in measures(scores).items():
        comparison = (of.get("comparison") or {}).get(capability)
        models = ((comparison or {}).get("heldout") or {}).get("models") or {}
        for key, words in (
            ("heldout", "held-out items"),
            ("seen", "ordinary items, the same categories"),
            ("drop", "held out minus ordinary"),
        ):
            if any(m.get(key) for m in models.values()):
                found.append(_line(scores, f"{measured}: {words}", {n: m.get(key) for n, m in models.items()}))
    for name, probe in (scores.get("probes") or {}).items():
        found.append(_line(scores, f"{probe['capability']}: {name}", probe["models"]))
    return found


def metrics(scores: Mapping[str, Any]) -> list[dict]:
    """The lines of the judge-free metrics: {name, code, better, meaning, cells}."""
    found = [
        _metric(scores, capability, name, {model: of.get(name) for model, of in by_model.items()})
        for capability, by_model in (scores.get("metrics") or {}).items()
        for name in dict.fromkeys(name for of in by_model.values() for name in of)
    ]
    sets = {m: s for m, s in (scores.get("pictures") or {}).items() if isinstance(s, Mapping)}
    for name in ("near_duplicates", "constant"):  # about all images of a model: shares without an interval
        cells = {m: {"mean": s[name], "n": s.get("n")} for m, s in sets.items() if s.get(name) is not None}
        found += [_metric(scores, "all images", name, cells)] if cells else []
    return found


def _metric(scores: Mapping[str, Any], of: str, name: str, cells: Mapping[str, Any]) -> dict:
    words = words_of(name)
    about = {"code": name, "better": words.better, "meaning": words.meaning}
    return _line(scores, f"{of}: {words.name}", cells) | about
