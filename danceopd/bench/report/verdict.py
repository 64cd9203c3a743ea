"""The verdict: one answer to "did anything get worse?", computed once, in the same words wherever it is printed.

In: paired differences of the student from the base and from the best teacher of each category, overall and by category.
"kept": every interval ends above minus the margin (non-inferiority). "lost": an interval is below zero and reaches
beyond the margin. "unknown": neither, and why. Items without a score count as the largest loss and the largest gain
that the scale allows; fewer than `LEAST_ITEMS` decide nothing. `_state` has two corrections that keep it honest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from danceopd.bench.interference import LEAST_ITEMS
from danceopd.bench.report import facts
from danceopd.bench.report.facts import ALL_RIGHT, OVERALL, listed, number
from danceopd.bench.statistics import TIE, Z
from danceopd.errors import UserError

MARGIN = 0.05
"""The share of the scale that may be lost and still counts as nothing."""
SIGN = {"lost": "▼", "kept": "✓", "unknown": "?"}
SHOWN = 3
"""Names in one sentence."""
WHOLE = (OVERALL, ALL_RIGHT)
"""What is no category: the overall score, and after it the overall share of items with all facts right."""
_RANK = {"lost": 0, "open": 1, "few": 1, "kept": 2}


@dataclass(frozen=True)
class Compared:
    """One paired difference: a figure of `statistics.difference`, the width of its scale, whether scores are 0 or 1."""

    capability: str
    category: str  # or one of WHOLE
    against: str  # as a sentence names it
    figure: Mapping[str, Any]
    width: float
    share: bool


def check_margin(margin: float) -> None:
    """UserError for a margin that is no share of the scale."""
    if not 0 < margin < 1:
        raise UserError(f"--margin is {margin:g}; give a share of the scale between 0 and 1, such as {MARGIN:g}")


def verdict_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict that `scores.json` holds; computed for a bench that is older than verdicts."""
    return scores.get("verdict") or verdict(scores)


def verdict(scores: Mapping[str, Any], margin: float = MARGIN) -> dict[str, Any]:
    """The verdict of a bench; see `decide`. Against the base, and against each category's best teacher."""
    compared = _compared(scores)
    reasons = [] if compared else [_without_references(scores)]
    reasons += [_nothing_scored(scores)] if compared and all(c.figure.get("mean") is None for c in compared) else []
    reasons += _same_score(scores)
    return decide(compared, margin, subject(scores), reasons)


def subject(scores: Mapping[str, Any]) -> str:
    """The model under test in a sentence, by the name that it was given."""
    label = str(facts.student_of(scores)["label"])
    return "the student" if label == "student" else label


def decide(compared: Sequence[Compared], margin: float, subject: str, reasons: Sequence[str] = ()) -> dict[str, Any]:
    """{kind, sentence, margin, against, worst, comparisons} of paired differences; `reasons` make it "unknown".

    `against`: capability -> whom. `worst`: capability -> its worst category: significant losses first, then what is
    not ruled out, then the others, the lowest mean first; a few items that gained are none. `comparisons`: every
    difference with its interval, widened for items without a score, `floor` (the lower end that must be above minus
    the margin) and `state`: lost, open, kept or few.
    """
    categories = sum(c.category not in WHOLE and _items(c) >= LEAST_ITEMS for c in compared)
    found = [_state(c, margin, 1 if c.category in WHOLE else categories) for c in compared]
    several = len({e["capability"] for e in found}) > 1
    ordered = sorted(found, key=_worst_first)
    worst: dict[str, dict] = {}
    for entry in ordered:
        if entry["category"] not in WHOLE and (entry["state"] != "few" or entry.get("share", 0.0) < 0):
            worst.setdefault(entry["capability"], entry)
    deepest = min(worst.values(), key=_worst_first, default=None)
    lost = [e for e in ordered if e["state"] == "lost"]
    named: list[dict] = []
    if not reasons and lost:
        kind, named = "lost", sorted(lost, key=lambda e: [*WHOLE, e["category"]].index(e["category"]))[:SHOWN]
        text = f"Something got worse: {', '.join(where(e, several) for e in named)}"
        text += f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    elif not reasons and all(e["state"] == "kept" for e in found):
        whom = listed(list(dict.fromkeys(_kind_of(e["against"]) for e in found)))
        names = {(e["capability"], e["category"]) for e in found if e["category"] not in WHOLE}
        each = f"each of {len(names)} categories" if len(names) > 1 else "its category"
        right = f", in the share with {ALL_RIGHT}" if any(e["category"] == ALL_RIGHT for e in found) else ""
        kind, text = "kept", f"Nothing lost within the margin: overall{right} and in {each}, "
        text += f"{subject} is at most {_percent(margin)} of the scale below {whom} (95 % confidence)"
    else:
        doubts = [*reasons, *_doubts(found, margin, several)]
        kind, text = "unknown", f"Cannot tell whether anything got worse: {'; '.join(doubts)}"
        if found and all(e["state"] == "kept" for e in found if e["category"] in WHOLE):
            text += f". Overall, nothing is lost within the margin of {_percent(margin)} of the scale"
    if deepest and deepest not in named:
        text += f". Worst category: {where(deepest, several)}"
    against: dict[str, list[str]] = {}
    for entry in found:
        if entry["against"] not in against.setdefault(entry["capability"], []):
            against[entry["capability"]].append(entry["against"])
    about = {"margin": margin, "least_items": LEAST_ITEMS, "against": against, "worst": worst, "comparisons": found}
    return {"kind": kind, "sentence": f"{text}."} | about


def _items(compared: Compared) -> int:
    return int(compared.figure.get("n") or 0)


def _state(compared: Compared, margin: float, tests: int) -> dict[str, Any]:
    """One difference with its `state`, one of so many `tests`.

    For "kept", one gain and one loss are added, of the whole scale for shares (Bonett and Price 2012) and of half of it
    for other scores, since a few equal differences have an interval of width zero. For "lost", the intervals of many
    categories are widened for their number (Bonferroni), since one of forty is below zero by chance. What is printed
    is the plain 95 % interval, with the bounds of items without a score.
    """
    of, n, width = compared.figure, _items(compared), compared.width
    mean, failed = of.get("mean"), int(of.get("failed") or 0)
    entry: dict[str, Any] = {"capability": compared.capability, "category": compared.category}
    entry |= {"against": compared.against, "mean": mean, "low": of.get("low"), "high": of.get("high")}
    entry |= {"n": n, "failed": failed}
    if mean is None:
        return entry | {"floor": None, "state": "few"}
    hidden = failed * width / (n + failed)
    below = mean - of.get("lower", mean - hidden) if failed else 0.0
    above = of.get("upper", mean + hidden) - mean if failed else 0.0
    added = Z * math.sqrt(2) * (width if compared.share else width / 2) / (n + 2)
    floor = mean - math.hypot(mean - of["low"], added) - below
    top = mean + (of["high"] - mean) * (_wider(n, tests) if tests > 1 and n > 1 else 1.0) + above
    low, high, least = of["low"] - below, of["high"] + above, -margin * width
    state = "few" if n < LEAST_ITEMS else "kept" if floor > least else "lost" if top < -TIE and low <= least else "open"
    ends = {"low": round(low, 6), "high": round(high, 6), "floor": round(floor, 6)}
    return entry | ends | {"share": round(mean / width, 6), "state": state}


def _wider(n: int, tests: int) -> float:
    """How much wider a 95 % interval becomes for so many tests: Student's t of n items, since a bootstrap of few items
    is too narrow far out, by its expansion in 1/(n - 1) (Abramowitz and Stegun 26.7.5)."""
    z, v = NormalDist().inv_cdf(1 - 0.025 / tests), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)
    return t / Z * math.sqrt(n / v)


def _worst_first(entry: Mapping[str, Any]) -> tuple:
    return _RANK[entry["state"]], entry.get("share", 0.0)


def _doubts(found: Sequence[dict], margin: float, several: bool) -> list[str]:
    """Why it cannot be told: items without a score, too few items, losses that are not ruled out."""
    doubtful = [e for e in found if e["state"] in ("open", "few")]
    reasons: list[str] = []
    if any(e["failed"] for e in doubtful):
        most = max(doubtful, key=lambda e: e["failed"])
        where = f" ({most['capability']})" if several else ""
        reasons.append(f"{most['failed']} of {most['failed'] + most['n']} items have no score{where}")
    few = {(e["capability"], e["category"]): e["n"] for e in doubtful if e["state"] == "few"}
    if few:
        names = [f"{c} ({f'{of}, ' if several else ''}{n})" for (of, c), n in list(few.items())[:SHOWN]]
        more = [f"{len(few) - SHOWN} more"] if len(few) > SHOWN else []
        reasons.append(f"fewer than {LEAST_ITEMS} scored items: {listed([*names, *more])}")
    counts = [e["n"] for e in doubtful if e["state"] == "open"]
    if counts:
        of = f"in {len(counts)} of {len(found)} comparisons a loss of more than {_percent(margin)} of the scale"
        items = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        reasons.append(f"{of} is not ruled out, with {items} items each")
    return reasons


def _name(entry: Mapping[str, Any], several: bool) -> str:
    return f"{entry['category']} ({entry['capability']})" if several else str(entry["category"])


def where(entry: Mapping[str, Any], several: bool = False) -> str:
    """A difference in words: its name, mean, interval, against whom."""
    interval = f"[{number(entry['low'], sign=True)} to {number(entry['high'], sign=True)}]"
    mean = number(entry["mean"], sign=True)
    return f"{_name(entry, several)} {mean} {interval} against {entry['against']}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _kind_of(against: str) -> str:
    return "the best teacher" if against.startswith("teacher ") else against


# -- the differences of a bench ------------------------------------------------------------------------------


def _compared(scores: Mapping[str, Any]) -> list[Compared]:
    """The student's differences from the base and from the best teacher, overall first, then by category.

    Of the share of items with all facts right only the overall one.
    """
    found = []
    for of, capability in facts.measures(scores).values():
        width, share = facts.span(of, capability), facts.is_share(of, capability)
        for category, name, figure in facts.differences_from_references(of, capability):
            if of is scores or category == OVERALL:
                what = category if of is scores else ALL_RIGHT
                found.append(Compared(capability, what, facts.who(scores, name), figure, width, share))
    return found


def _without_references(scores: Mapping[str, Any]) -> str:
    """Why a bench without a base and without teachers has no verdict, and how the student compares with the others."""
    several = len(facts.capabilities(scores)) > 1
    parts = [
        where(
            delta | {"capability": capability, "category": OVERALL, "against": facts.label(scores, name)}, several
        )
        for capability in facts.capabilities(scores)
        for name, delta in ((scores.get("comparison") or {}).get(capability) or {"deltas": {}})["deltas"].items()
        if delta.get("mean") is not None and name in {m["name"] for m in scores["models"]}
    ]
    why = "there is no base and no teacher to compare with"
    return f"{why} ({listed(parts)})" if parts else why


def _nothing_scored(scores: Mapping[str, Any]) -> str:
    reasons = scores.get("unscored") or []
    return "nothing was scored" + (f" ({reasons[0]['reason']})" if reasons else "")


def _same_score(scores: Mapping[str, Any]) -> list[str]:
    """The reason where a judge gave every picture of every model the same score."""
    for capability in facts.capabilities(scores):
        every = [
            figure
            for model in scores["models"]
            for figure in ((model.get(capability) or {}).get("categories") or {}).values()
            if figure.get("mean") is not None
        ]
        values = {figure[key] for figure in every for key in ("mean", "low", "high")}
        if len(values) == 1 and len(scores["models"]) > 1 and not facts.is_share(scores, capability):
            return [f"every picture of every model got the same score, {number(values.pop())} ({capability})"]
    return []
