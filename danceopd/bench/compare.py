"""Numbers about models: means with intervals, paired differences, the gap closed, the worst regression.

Input is rows: one plain dict an item and model, with `model`, `capability`, `category`, `key` and `score`
(generation: 0 or 1; editing: O from 0 to 10). The overall score is the unweighted mean of the category means,
as in the paper. Intervals are 95 %: Wilson's for shares, bootstrap percentiles for the rest; differences are
paired by item and resampled within each category. Equal rows give equal numbers: the resampling is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

RESAMPLES = 2000
Z = 1.959964
LEAST_GAP = {"generation": 0.02, "editing": 0.2}
"""A teacher this little ahead of the base leaves no gap that could be closed."""


def _number(value: float) -> float:
    return round(float(value), 6)


def scores_of(rows: Iterable[dict], model: str, capability: str) -> dict[str, dict[str, float]]:
    """category -> item key -> score, for one model and capability, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == model and row["capability"] == capability and not row.get("probe"):
            found.setdefault(row["category"], {})[row["key"]] = float(row["score"])
    return found


def _wilson(values: np.ndarray) -> tuple[float, float]:
    n, p = len(values), float(values.mean())
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _resampled(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Bootstrap draws of the macro mean; a group is (items,) or (series, items), resampled along its items."""
    random = np.random.default_rng(20260622)
    total: np.ndarray | float = 0.0
    for group in groups:
        index = random.integers(0, group.shape[-1], (RESAMPLES, group.shape[-1]))
        total = total + group[..., index].mean(-1)
    return np.asarray(total) / len(groups)


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean(values: Sequence[float], share: bool) -> dict:
    """{mean, n, low, high} of one category; `share` says that the values are 0 or 1."""
    array = np.asarray(values, float)
    low, high = _wilson(array) if share else _bounds(_resampled([array]))
    return {"mean": _number(array.mean()), "n": len(array), "low": _number(low), "high": _number(high)}


def macro(groups: Sequence[Sequence[float]], share: bool) -> dict:
    """{mean, n, low, high} of the unweighted mean of category means.

    Shares use the Agresti-Coull variance of each category, since resampling a category that is all right or
    all wrong would claim certainty.
    """
    arrays = [np.asarray(group, float) for group in groups]
    centre = float(np.mean([a.mean() for a in arrays]))
    if share:
        rates = [((a.sum() + 2) / (len(a) + 4), len(a) + 4) for a in arrays]
        half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in rates)) / len(arrays)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
    else:
        low, high = _bounds(_resampled(arrays))
    return {"mean": _number(centre), "n": sum(map(len, arrays)), "low": _number(low), "high": _number(high)}


def summary(rows: Sequence[dict], model: str, capability: str) -> dict | None:
    """{overall, groups, categories} of one model, or None when it has no item of that capability."""
    found = scores_of(rows, model, capability)
    if not found:
        return None
    share = capability == "generation"
    values = {category: list(by_key.values()) for category, by_key in found.items()}
    group_of = {row["category"]: row.get("group") for row in rows if not row.get("probe")}
    groups = {group: [values[c] for c in values if group_of[c] == group] for group in group_of.values() if group}
    return {
        "overall": macro(list(values.values()), share),
        "groups": {group: macro(parts, share) for group, parts in groups.items() if parts},
        "categories": {category: mean(found, share) for category, found in values.items()},
    }


def _paired(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> dict[str, np.ndarray]:
    """category -> (2, items) of the items both models have."""
    found = {}
    for category, values in one.items():
        keys = [key for key in values if key in other.get(category, {})]
        if keys:
            found[category] = np.array([[values[k] for k in keys], [other[category][k] for k in keys]])
    return found


def delta(rows: Sequence[dict], model: str, other: str, capability: str) -> dict | None:
    """`model` minus `other`: {mean, low, high, wins, losses, ties, categories}, paired by item."""
    pairs = _paired(scores_of(rows, model, capability), scores_of(rows, other, capability))
    if not pairs:
        return None
    differences = {category: pair[0] - pair[1] for category, pair in pairs.items()}
    every = np.concatenate(list(differences.values()))
    low, high = _bounds(_resampled(list(differences.values())))
    categories = {}
    for category, values in differences.items():
        a, b = _bounds(_resampled([values]))
        categories[category] = {"mean": _number(values.mean()), "n": len(values), "low": _number(a), "high": _number(b)}
    return {
        "mean": _number(np.mean([d.mean() for d in differences.values()])),
        "low": _number(low),
        "high": _number(high),
        "wins": int((every > 1e-9).sum()),
        "losses": int((every < -1e-9).sum()),
        "ties": int((abs(every) <= 1e-9).sum()),
        "categories": categories,
    }


def gap_closed(rows: Sequence[dict], student: str, base: str, teacher: str, capability: str) -> dict | None:
    """{share, low, high} = (student - base) / (teacher - base); share None where the teacher is not ahead."""
    by_model = [scores_of(rows, name, capability) for name in (student, base, teacher)]
    groups = []
    for category, values in by_model[0].items():
        keys = [k for k in values if all(k in other.get(category, {}) for other in by_model[1:])]
        if keys:
            groups.append(np.array([[scores[category][k] for k in keys] for scores in by_model]))
    if not groups:
        return None
    s, b, t = np.mean([g.mean(-1) for g in groups], axis=0)
    if t - b < LEAST_GAP.get(capability, 1e-9):
        return {"share": None, "low": None, "high": None, "teacher": teacher}
    draws = _resampled(groups)
    gaps = draws[2] - draws[1]
    held = gaps > 1e-9
    low, high = _bounds((draws[0] - draws[1])[held] / gaps[held]) if held.any() else (math.nan, math.nan)
    share = (s - b) / (t - b)
    return {"share": _number(share), "low": _number(low), "high": _number(high), "teacher": teacher}


def worst_regression(rows: Sequence[dict], student: str, teachers: Sequence[str], capability: str) -> dict | None:
    """The category in which the student stands lowest against the best teacher there: {category, teacher, mean, …}."""
    mine = summary(rows, student, capability)
    theirs = {name: found for name in teachers if (found := summary(rows, name, capability))}
    if mine is None or not theirs:
        return None
    worst: dict | None = None
    for category, value in mine["categories"].items():
        able = [name for name in theirs if category in theirs[name]["categories"]]
        if not able:
            continue
        best = max(able, key=lambda name: theirs[name]["categories"][category]["mean"])
        gain = value["mean"] - theirs[best]["categories"][category]["mean"]
        if worst is None or gain < worst["mean"]:
            worst = {"category": category, "teacher": best, "mean": _number(gain)}
    if worst:
        paired = delta(rows, student, worst["teacher"], capability)
        if paired and worst["category"] in paired["categories"]:
            worst |= {k: paired["categories"][worst["category"]][k] for k in ("low", "high", "n")}
    return worst


def comparison(
    rows: Sequence[dict],
    student: str,
    base: str | None,
    teachers: Sequence[str],
    others: Sequence[str],
    capability: str,
) -> dict | None:
    """Everything about the student in one capability: deltas to all others, gap closed, worst regression."""
    if summary(rows, student, capability) is None:
        return None
    standing = {name: found["overall"]["mean"] for name in teachers if (found := summary(rows, name, capability))}
    best = max(standing, key=lambda name: standing[name]) if standing else None
    return {
        "best_teacher": best,
        "deltas": {name: found for name in others if (found := delta(rows, student, name, capability))},
        "gap_closed": gap_closed(rows, student, base, best, capability) if base and best else None,
        "worst": worst_regression(rows, student, teachers, capability),
    }
