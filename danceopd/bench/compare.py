"""Two finished benches compared item by item: paired differences with intervals, win/loss/tie, a sign test.

The suite, its version, its protocol, the judge and the seeds must be equal, and only items of both benches are counted.
What else differs (the call, the limit, the machine) is noted beside the numbers. Differences are the first model minus
the second; the verdict is on the first model (report/verdict.py). Everything is read from the folders, so either bench
may have been made elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from danceopd.bench import statistics
from danceopd.bench.pairwise import Pair
from danceopd.bench.report.facts import ALL_RIGHT, OVERALL
from danceopd.bench.report.verdict import MARGIN, Compared, decide
from danceopd.bench.results import load
from danceopd.common.files import inside
from danceopd.common.messages import did_you_mean
from danceopd.errors import UserError

FORMAT = "danceopd-compare/1"


@dataclass(frozen=True)
class Side:
    """One model of one finished bench."""

    folder: Path
    model: str
    scores: dict
    rows: list[dict]

    @property
    def about(self) -> dict[str, Any]:
        """The model's entry in `scores.json`."""
        return next(m for m in self.scores["models"] if m["name"] == self.model)

    def path(self, image: str | None) -> Path | None:
        """The path of an image of the bench; None where there is none inside its folder."""
        file = None if image is None else inside(self.folder, image)
        return file if file is not None and file.is_file() else None


def load_side(folder: str | Path, model: str | None = None) -> Side:
    """The student of a bench folder, or another of its models; UserError if there is no such bench or model."""
    folder = Path(folder)
    scores, rows = load(folder)
    names = [m["name"] for m in scores["models"]]
    chosen = model or scores.get("student")
    if chosen is None or chosen not in names:
        what = "student" if chosen is None else f"model {chosen!r}"
        raise UserError(f"bench {folder} has no {what}{did_you_mean(chosen or '', names)}; choose one with --models")
    mine = [row for row in rows if row["model"] == chosen]
    if not mine:
        raise UserError(f"bench {folder} has no rows of {chosen!r}; choose another model with --models")
    return Side(folder, chosen, scores, mine)


def setup_differences(a: Side, b: Side) -> list[str]:
    """What must be equal and is not, in words: suite, version, protocol, judge, seed."""
    one, other = (
        {**s.scores["suite"], "seed": s.scores.get("seed"), "judge": _judge(s.scores.get("judge"))} for s in (a, b)
    )
    words = []
    for key in ("name", "version", "protocol", "seed"):
        if one.get(key) != other.get(key):
            name = {"name": "suite", "version": "suite version"}.get(key, key)
            words.append(f"{name} ({_short(one.get(key))} and {_short(other.get(key))})")
    if one["judge"] != other["judge"]:
        mine, theirs = (s if isinstance(s, Mapping) else {} for s in (one["judge"], other["judge"]))
        keys = [key for key in dict.fromkeys([*mine, *theirs]) if mine.get(key) != theirs.get(key)]
        parts = [f"{key} {_short(mine.get(key))} and {_short(theirs.get(key))}" for key in keys[:3]]
        words.append(f"judge ({', '.join(parts) if mine and theirs else 'only one bench has one'})")
    if one["seed"] == other["seed"]:
        seeds = {_item(row): row.get("seed") for row in b.rows}
        apart = sum(_item(row) in seeds and seeds[_item(row)] != row.get("seed") for row in a.rows)
        if apart:
            words.append(f"seeds of {apart} items")
    return words


def _judge(identity: Any) -> Any:
    """The judge's identity; for replayed answers that of the judge who gave them, if it is recorded."""
    if not isinstance(identity, Mapping) or identity.get("kind") != "replay":
        return identity
    recorded = identity.get("recorded") or []
    return recorded[0] if len(recorded) == 1 else {"kind": "replay", "recorded": recorded}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _item(row: Mapping[str, Any]) -> tuple:
    """Equal for rows of the same item; the key alone could belong to another prompt."""
    return row["capability"], row["category"], row["key"], row.get("prompt")


def compare(a: Side, b: Side, anyway: bool = False, margin: float = MARGIN) -> dict[str, Any]:
    """The comparison as plain JSON; see `statistics.difference` for its figures.

    `capabilities`: by name `a` and `b` (summaries of the common items), `difference`, `metrics`; `exact`, the same of
    the share with all facts right, where the suite has one. `probes` and `heldout` have a difference each. `items`:
    every common item with both scores and images, the largest loss of the first model first. `only`: how many items
    just one bench has. `warnings`: what should be equal and is not, accepted with `anyway` only; `notes`: what else
    differs. `verdict`: whether the first model is worse, with a `margin` that is a share of the scale. UserError where
    the setups differ or no item is common.
    """
    if (a.folder.resolve(), a.model) == (b.folder.resolve(), b.model):
        raise UserError(f"both sides are {a.model!r} of {a.folder}; give two benches, or two models with --models a,b")
    warnings = setup_differences(a, b)
    if warnings and not anyway:
        raise UserError(
            f"{a.folder} and {b.folder} were not run alike: they differ in {'; '.join(warnings)}; run both benches "
            "alike, or add --anyway to compare the items that they have in common"
        )
    ones, others = ({_item(row): row for row in s.rows} for s in (a, b))
    common = [item for item in ones if item in others]
    if not common:
        raise UserError(f"{a.folder} and {b.folder} have no item in common; compare benches of one suite")
    rows = [found[item] | {"model": name} for name, found in (("a", ones), ("b", others)) for item in common]
    suite = a.scores["suite"]
    kinds = {c: _kind(suite, c) for c in dict.fromkeys(row["capability"] for row in rows)}
    capabilities = {c: found for c, kind in kinds.items() if (found := _capability(rows, c, **kind))}
    for capability in {*(suite.get("exact") or ()), *(b.scores["suite"].get("exact") or ())} & {*capabilities}:
        right = _capability(statistics.exact_rows(rows, capability), capability, **statistics.EXACT)
        capabilities[capability]["exact"] = right
    return {
        "format": FORMAT,
        "a": _about(a),
        "b": _about(b),
        "suite": {key: suite.get(key) for key in ("name", "version", "protocol")},
        "seed": a.scores.get("seed"),
        "judge": a.scores.get("judge"),
        "warnings": warnings,
        "notes": _notes(a, b),
        "only": {"a": len(ones) - len(common), "b": len(others) - len(common)},
        "capabilities": capabilities,
        "verdict": _verdict(a, b, capabilities, kinds, margin),
        "probes": _apart(rows, kinds, "probe", {r["probe"]: r["capability"] for r in rows if r.get("probe")}),
        "heldout": _heldout(rows, kinds),
        "items": _items([(ones[item], others[item]) for item in common]),
    }


def _verdict(a: Side, b: Side, found: Mapping[str, dict], kinds: Mapping[str, dict], margin: float) -> dict[str, Any]:
    """The verdict on A, measured against B."""
    compared: list[Compared] = []
    for capability, parts in found.items():
        low, high = _ends(capability, **kinds[capability])
        share = kinds[capability]["share"]
        share = capability == "generation" if share is None else share
        figures = {OVERALL: parts["difference"], **parts["difference"]["categories"]}
        compared += [Compared(capability, c, f"B ({b.model})", f, high - low, share) for c, f in figures.items()]
        if "exact" in parts:
            figure = parts["exact"]["difference"]
            compared.append(Compared(capability, ALL_RIGHT, f"B ({b.model})", figure, 1.0, True))
    reasons = [] if compared else ["no ordinary item is in both benches"]
    return decide(compared, margin, f"A ({a.model})", reasons)


def _ends(capability: str, share: bool | None, scale: statistics.Scale | None) -> statistics.Scale:
    """The lowest and the highest score."""
    return statistics.scale_of(capability == "generation" if share is None else share, scale)


def _kind(suite: Mapping[str, Any], capability: str) -> dict[str, Any]:
    """`share` and `scale` of a capability, as the bench recorded them."""
    scale = (suite.get("scale") or {}).get(capability)
    return {"share": (suite.get("share") or {}).get(capability), "scale": tuple(scale) if scale else None}


def _about(s: Side) -> dict[str, Any]:
    kept = {key: s.about.get(key) for key in ("label", "role", "path", "sha256")}
    return {"folder": str(s.folder), "model": s.model, "created": s.scores.get("created")} | kept


def _notes(a: Side, b: Side) -> list[str]:
    """What differs and does not have to be equal."""
    usages = [(s.scores.get("judging") or {}).get("usage") or {} for s in (a, b)]
    mine, theirs = (" + ".join(sorted(usage.get("judges") or ())) for usage in usages)
    found = [] if mine == theirs else [f"judge snapshots: {mine or 'none'} and {theirs or 'none'}"]
    for key in ("limit", "call", "base", "machine", "versions"):
        one, other = a.scores.get(key), b.scores.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
            found += [f"{key} {name}: {_short(one.get(name))} and {_short(other.get(name))}" for name in names]
        elif one != other:
            found.append(f"{key}: {_short(one)} and {_short(other)}")
    return found


def _is(key: str, value: Any, row: Mapping[str, Any]) -> bool:
    return row.get(key) == value


def _metric(name: str, row: Mapping[str, Any]) -> float | None:
    return (row.get("metrics") or {}).get(name)


def _capability(
    rows: Sequence[dict], capability: str, share: bool | None, scale: statistics.Scale | None
) -> dict[str, Any] | None:
    """Both summaries, the paired difference, and that of every metric that both have."""
    found = statistics.delta(rows, "a", "b", capability, share, scale)
    if found is None:
        return None
    metrics = {}
    for name in dict.fromkeys(n for row in rows if row["capability"] == capability for n in row.get("metrics") or ()):
        one, other = (statistics.scores_of(rows, side, capability, partial(_metric, name)) for side in "ab")
        figure = statistics.difference(one, other, (0.0, 0.0))  # a metric has no lowest and highest value
        if figure and figure["n"]:
            metrics[name] = {key: figure[key] for key in ("mean", "low", "high", "n", "p")}
    sums = {side: statistics.summary(rows, side, capability, share, scale) for side in "ab"}
    return {**sums, "difference": found, "metrics": metrics}


def _apart(rows: Sequence[dict], kinds: Mapping[str, dict], what: str, names: Mapping[Any, str]) -> dict[str, dict]:
    """Name -> the difference over the rows whose field `what` is that name; `names` maps names to capabilities."""
    found = {}
    for name, capability in names.items():
        scale = _ends(capability, **kinds[capability])
        one, other = (statistics.scores_of(rows, side, capability, wanted=partial(_is, what, name)) for side in "ab")
        if figure := statistics.difference(one, other, scale):
            found[str(name)] = {"capability": capability} | figure
    return found


def _heldout(rows: Sequence[dict], kinds: Mapping[str, dict]) -> dict[str, dict]:
    """Capability -> the difference over the held-out items."""
    parts = {c: _apart(rows, kinds, "heldout", {True: c}) for c in kinds}
    return {capability: part["True"] for capability, part in parts.items() if part}


def _items(pairs: Sequence[tuple[dict, dict]]) -> list[dict]:
    """Both scores and both images of every item, the largest loss of the first model first."""
    found = []
    for one, other in pairs:
        mine, theirs = statistics.score_of(one), statistics.score_of(other)
        apart = None if mine is None or theirs is None else mine - theirs
        kept = {key: one.get(key) for key in ("capability", "category", "key", "prompt", "probe", "heldout")}
        images = {"a_image": one.get("image"), "b_image": other.get("image"), "source": one.get("source")}
        found.append(kept | {"a": mine, "b": theirs, "difference": apart} | images)
    return sorted(found, key=lambda item: (item["difference"] is None, item["difference"] or 0.0))


def pairs(a: Side, b: Side) -> list[Pair]:
    """The common ordinary items as pairs of images, for a judge to vote on."""
    others = {_item(row): row for row in b.rows}
    places: dict[str, set[str]] = {}
    for row in a.rows:
        places.setdefault(row["key"], set()).add(row["category"])
    return [
        Pair(
            key=row["key"] if len(places[row["key"]]) == 1 else f"{row['category']}/{row['key']}",
            capability=row["capability"],
            category=row["category"],
            prompt=row["prompt"],
            a=a.path(row.get("image")),
            b=b.path(others[_item(row)].get("image")),
            source=a.path(row.get("source")),
        )
        for row in a.rows
        if _item(row) in others and statistics.ordinary(row)
    ]
