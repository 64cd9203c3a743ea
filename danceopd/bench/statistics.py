"""Statistics of scores: means with intervals, paired differences, the gap closed.

In: rows, one plain dict for each item and model, with `model`, `capability`, `category`, `key` and `score` (None where
there is none: the image is missing, or the judge's answer unreadable). Out: figures, plain dicts with `mean`, `n`, a
95 % interval (`low`, `high`), `failed`, and `lower` and `upper`: the mean if every failure had the lowest or the
highest score. Failures are counted and in no mean. The overall score is the unweighted mean of the category means, as
in the paper. Intervals are Wilson's for shares and bootstrap percentiles otherwise. Differences are paired by item and
resampled within each category; a category's only item may differ by the whole scale. Equal rows give equal numbers.
Probes and held-out items are reported apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Scale = tuple[float, float]
Scores = Mapping[str, Mapping[str, "float | None"]]
"""Category -> item key -> score, None for a failure."""

RESAMPLES = 2000
Z = 1.959964
LEAST_GAP = 0.02
"""A teacher must be ahead of the base by at least this share of the scale for a gap to close."""
TIE = 1e-9
"""Scores that differ by less are equal."""


def ordinary(row: Mapping[str, Any]) -> bool:
    """Whether a row counts in the overall scores: it is no probe and not held out."""
    return not row.get("probe") and not row.get("heldout")


def _is_share(capability: str, share: bool | None) -> bool:
    return capability == "generation" if share is None else share


def scale_of(share: bool, scale: Scale | None = None) -> Scale:
    """The given scale, else 0 to 1 for shares and 0 to 10 otherwise."""
    return scale or ((0.0, 1.0) if share else (0.0, 10.0))


def _number(value: float) -> float:
    return round(float(value), 6)


def score_of(row: Mapping[str, Any]) -> float | None:
    """A row's score; None where it has none or it is not finite."""
    value = row["score"]
    return float(value) if value is not None and math.isfinite(value) else None


EXACT: dict[str, Any] = {"share": True, "scale": (0.0, 1.0)}
"""How the scores of `exact_rows` are to be read."""


def exact_rows(rows: Iterable[Mapping[str, Any]], capability: str) -> list[dict[str, Any]]:
    """The rows of a capability with another score: 1 for full marks (`correct`), else 0; None where there is none."""
    return [
        {**row, "score": None if score_of(row) is None or row.get("correct") is None else float(bool(row["correct"]))}
        for row in rows
        if row["capability"] == capability
    ]


def scores_of(
    rows: Iterable[Mapping[str, Any]],
    model: str,
    capability: str,
    value: Callable[[Mapping[str, Any]], float | None] = score_of,
    wanted: Callable[[Mapping[str, Any]], bool] = ordinary,
) -> dict[str, dict[str, float | None]]:
    """Category -> item key -> score (None: failed) of one model and capability, in the order of the rows."""
    found: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["model"] == model and row["capability"] == capability and wanted(row):
            found.setdefault(row["category"], {})[row["key"]] = value(row)
    return found


def _wilson(values: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    n, p = len(values), float(values.mean())
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _resampled(groups: Sequence[np.ndarray], seed: int = 20260622) -> np.ndarray:
    """Bootstrap samples of the macro mean; a group is (items,) or (series, items), resampled along its items."""
    random = np.random.default_rng(seed)
    total: np.ndarray | float = 0.0
    for group in groups:
        index = random.integers(0, group.shape[-1], (RESAMPLES, group.shape[-1]))
        total = total + group[..., index].mean(-1)
    return np.asarray(total) / len(groups)


def _bounds(samples: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _scored(values: Iterable[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None], float)


def _figure(groups: Sequence[Sequence[float | None]], centre: Any, low: Any, high: Any, scale: Scale) -> dict:
    """The figure of a macro mean: mean, interval, counts, and the bounds that its failures leave."""
    n, total = sum(len(_scored(group)) for group in groups), sum(map(len, groups))
    lower, upper = (
        np.mean([np.mean([end if v is None else v for v in group]) for group in groups if len(group)]) for end in scale
    )
    return {
        "mean": None if n == 0 else _number(centre),
        "n": n,
        "low": None if n == 0 else _number(low),
        "high": None if n == 0 else _number(high),
        "failed": total - n,
        "lower": _number(lower),
        "upper": _number(upper),
    }


def mean(values: Sequence[float | None], share: bool, scale: Scale | None = None) -> dict:
    """The figure {mean, n, low, high, failed, lower, upper} of one category; `share`: the values are 0 or 1.

    None counts in `failed`, not in `n`; with nothing else the mean is None. `scale`: the lowest and the highest value.
    """
    array = _scored(values)
    low, high = (0.0, 0.0) if not len(array) else _wilson(array) if share else _bounds(_resampled([array]))
    return _figure([values], array.mean() if len(array) else None, low, high, scale_of(share, scale))


def macro(groups: Sequence[Sequence[float | None]], share: bool, scale: Scale | None = None) -> dict:
    """The figure {mean, n, low, high, failed, lower, upper} of the unweighted mean of category means.

    Shares use the Agresti-Coull variance of each category, since resampling a category that is all correct or all
    wrong would give an interval of width zero. A category of failures only is in `lower` and `upper` only.
    """
    arrays = [array for group in groups if len(array := _scored(group))]
    if not arrays:
        return _figure(groups, None, None, None, scale_of(share, scale))
    centre = float(np.mean([a.mean() for a in arrays]))
    if share:
        rates = [((a.sum() + 2) / (len(a) + 4), len(a) + 4) for a in arrays]
        half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in rates)) / len(arrays)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
    else:
        low, high = _bounds(_resampled(arrays))
    return _figure(groups, centre, low, high, scale_of(share, scale))


def summary(
    rows: Sequence[dict], model: str, capability: str, share: bool | None = None, scale: Scale | None = None
) -> dict | None:
    """{overall, groups, categories} of one model, or None when it has no item of the capability.

    `share`: whether scores are 0 or 1; by default those of generation are. `scale`: see `scale_of`.
    """
    found = scores_of(rows, model, capability)
    if not found:
        return None
    share = _is_share(capability, share)
    values = {category: list(by_key.values()) for category, by_key in found.items()}
    group_of = {row["category"]: row.get("group") for row in rows if ordinary(row)}
    groups = {group: [values[c] for c in values if group_of[c] == group] for group in group_of.values() if group}
    return {
        "overall": macro(list(values.values()), share, scale),
        "groups": {group: macro(parts, share, scale) for group, parts in groups.items() if parts},
        "categories": {category: mean(found, share, scale) for category, found in values.items()},
    }


def in_subset(row: Mapping[str, Any], parts: Iterable[str]) -> bool:
    """Whether a row belongs to a subset: in one of its categories (any, if none is named), with all its `tag:…`."""
    parts = set(parts)
    tags = {part for part in parts if part.startswith("tag:")}
    own = {f"tag:{tag}" for tag in row.get("tags") or ()}
    return tags <= own and (parts == tags or row["category"] in parts)


def subsets(
    rows: Sequence[dict], models: Sequence[str], capability: str, named: Mapping[str, Iterable[str]],
    share: bool | None = None, scale: Scale | None = None,
) -> dict[str, dict[str, dict]]:  # fmt: skip
    """Subset -> model -> its overall figure there; subsets without an item of the capability are left out."""
    found = {}
    for name, parts in named.items():
        kept = [row for row in rows if in_subset(row, parts)]
        sums = {model: s["overall"] for model in models if (s := summary(kept, model, capability, share, scale))}
        if sums:
            found[name] = sums
    return found


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the exact sign test: the chance of a split this uneven if neither is better; 1 without items."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def _difference(pairs: Mapping[str, list[tuple[float | None, float | None]]], scale: Scale) -> dict:
    """The figure of paired scores by category: macro mean of the differences, wins, losses, ties and p."""
    width = scale[1] - scale[0]
    values = {c: [None if a is None or b is None else a - b for a, b in pair] for c, pair in pairs.items()}
    arrays = [array for found in values.values() if len(array := _scored(found))]
    low, high = _bounds(_resampled(arrays)) if arrays else (0.0, 0.0)
    for lone in (a[0] / len(arrays) for a in arrays if len(a) == 1):  # resampling gives no width to one item
        low, high = low - lone - width / len(arrays), high - lone + width / len(arrays)
    centre = np.mean([a.mean() for a in arrays]) if arrays else None
    figure = _figure(list(values.values()), centre, low, high, (-width, width))
    every = np.concatenate(arrays) if arrays else np.zeros(0)
    wins, losses = int((every > TIE).sum()), int((every < -TIE).sum())
    return figure | {
        "wins": wins,
        "losses": losses,
        "ties": len(every) - wins - losses,
        "p": _number(sign_test(wins, losses)) if len(every) else None,
    }


def difference(one: Scores, other: Scores, scale: Scale) -> dict | None:
    """`one` minus `other`, paired by item: a figure with wins, losses, ties and the sign test's p, and by category.

    Items of only one side are left out, None on either side counts in `failed`; None without a common item. A failure
    can hide any difference that the scale allows, so `lower` and `upper` are far apart. Without a pair, p is
    None.
    """
    pairs = {
        category: found
        for category, values in one.items()
        if (found := [(v, other[category][k]) for k, v in values.items() if k in other.get(category, {})])
    }
    if not pairs:
        return None
    categories = {category: _difference({category: pair}, scale) for category, pair in pairs.items()}
    return _difference(pairs, scale) | {"categories": categories}


def delta(
    rows: Sequence[dict], model: str, other: str, capability: str,
    share: bool | None = None, scale: Scale | None = None,
) -> dict | None:  # fmt: skip
    """`model` minus `other`, paired by item; see `difference`."""
    found = scale_of(_is_share(capability, share), scale)
    return difference(scores_of(rows, model, capability), scores_of(rows, other, capability), found)


def gap_closed(
    rows: Sequence[dict], student: str, base: str, teacher: str, capability: str,
    share: bool | None = None, scale: Scale | None = None,
) -> dict | None:  # fmt: skip
    """{share, low, high} of the gap closed, (student - base) / (teacher - base); None if the teacher is not ahead."""
    by_model = [scores_of(rows, name, capability) for name in (student, base, teacher)]
    groups = []
    for category, values in by_model[0].items():
        series = [[by_key.get(category, {}).get(k) for by_key in by_model] for k in values]
        whole = [scores for scores in series if None not in scores]
        if whole:
            groups.append(np.array(whole, float).T)
    if not groups:
        return None
    s, b, t = np.mean([g.mean(-1) for g in groups], axis=0)
    low_end, high_end = scale_of(_is_share(capability, share), scale)
    if t - b < LEAST_GAP * (high_end - low_end):
        return {"share": None, "low": None, "high": None, "teacher": teacher}
    samples = _resampled(groups)
    gaps = samples[2] - samples[1]
    ahead = gaps > TIE
    low, high = _bounds((samples[0] - samples[1])[ahead] / gaps[ahead])  # at least half of the samples have a gap
    return {"share": _number((s - b) / (t - b)), "low": _number(low), "high": _number(high), "teacher": teacher}


def against_best(
    rows: Sequence[dict], student: str, teachers: Sequence[str], capability: str,
    share: bool | None = None, scale: Scale | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Category -> the student minus the best teacher of that category: `teacher`, and the figure of `difference`.

    The best teacher is chosen by its mean on the same items, which favours the teacher: chance counts for it.
    """
    theirs = {name: scores_of(rows, name, capability) for name in teachers}
    means = {n: {c: v.mean() for c, k in t.items() if len(v := _scored(k.values()))} for n, t in theirs.items()}
    width = scale_of(_is_share(capability, share), scale)
    found = {}
    for category, values in scores_of(rows, student, capability).items():
        scored = [name for name in teachers if category in means[name]]
        if scored:
            best = max(scored, key=lambda name: means[name][category])
            paired = difference({category: values}, theirs[best], width)
            if paired:
                found[category] = {"teacher": best} | paired["categories"][category]
    return found


def heldout(
    rows: Sequence[dict], student: str, others: Sequence[str],
    capability: str, share: bool | None = None, scale: Scale | None = None,
) -> dict | None:  # fmt: skip
    """The held-out items: `models` (`heldout` and `seen`, in the categories that have both), `deltas`, `categories`.

    `seen` are the ordinary items. `drop` is held out minus seen, unpaired; `deltas` are the student minus each other
    model on the held-out items, paired. None where the student has no held-out item.
    """
    share = _is_share(capability, share)
    scale = scale_of(share, scale)
    apart = {
        name: scores_of(rows, name, capability, wanted=lambda row: bool(row.get("heldout")))
        for name in (student, *others)
    }
    if not apart[student]:
        return None
    models = {}
    for name, found in apart.items():
        seen = {c: v for c, v in scores_of(rows, name, capability).items() if c in found}
        if found:
            unseen = macro([list(found[c].values()) for c in seen or found], share, scale)
            usual = macro([list(v.values()) for v in seen.values()], share, scale) if seen else None
            models[name] = {"heldout": unseen, "seen": usual, "drop": _drop(found, seen)}
    deltas = {n: d for n in others if (d := difference(apart[student], apart[n], scale))}
    return {"categories": list(apart[student]), "models": models, "deltas": deltas}


def _drop(unseen: Scores, seen: Scores) -> dict | None:
    """Held out minus seen, macro over the categories with scores of both; the two are resampled separately."""
    parts = [
        (a, b) for c, v in seen.items() if len(a := _scored(unseen[c].values())) and len(b := _scored(v.values()))
    ]
    if not parts:
        return None
    ones, others = zip(*parts)
    low, high = _bounds(_resampled(ones) - _resampled(others, seed=1))  # with one seed the two would be paired
    centre = np.mean([a.mean() - b.mean() for a, b in parts])
    return {"mean": _number(centre), "low": _number(low), "high": _number(high)}


def comparison(
    rows: Sequence[dict], student: str, base: str | None, teachers: Sequence[str], others: Sequence[str],
    capability: str, share: bool | None = None, scale: Scale | None = None,
) -> dict | None:  # fmt: skip
    """The student in one capability: deltas, gaps closed, held-out items; None if it has no item."""
    if summary(rows, student, capability, share, scale) is None:
        return None
    sums = {name: summary(rows, name, capability, share, scale) for name in teachers}
    means = {n: s["overall"]["mean"] for n, s in sums.items() if s and s["overall"]["mean"] is not None}
    best = max(means, key=lambda name: means[name]) if means else None
    kind: dict[str, Any] = {"share": share, "scale": scale}
    gaps = {t: g for t in teachers if base and (g := gap_closed(rows, student, base, t, capability, **kind))}
    return {
        "best_teacher": best,
        "deltas": {name: found for name in others if (found := delta(rows, student, name, capability, **kind))},
        "gap_closed": gaps.get(best) if best else None,
        "gaps": gaps,
        "against_best": against_best(rows, student, teachers, capability, **kind),
        "heldout": heldout(rows, student, others, capability, **kind),
    }
