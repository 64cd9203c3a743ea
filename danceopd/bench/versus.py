"""Two finished benches against each other: who wins which items, by category, with paired intervals and a sign test.

Only what was asked alike can be compared: suite, version, protocol, judge and seeds must be equal, and only items that
both have are counted. What else differs (the call, the limit, the machine) is said beside the numbers. Differences
are the first model minus the second. Everything is read from the folders, so either bench may be from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from danceopd.bench import compare
from danceopd.bench.pairs import Pair
from danceopd.bench.scores import load
from danceopd.errors import UserError
from danceopd.sentences import nearest

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
        """What `scores.json` says about the model."""
        return next(m for m in self.scores["models"] if m["name"] == self.model)

    def path(self, place: str | None) -> Path | None:
        """A picture of the bench; None where there is none."""
        file = None if place is None else self.folder / place
        return file if file is not None and file.is_file() else None


def side(folder: str | Path, model: str | None = None) -> Side:
    """A bench folder's student, or another of its models. UserError for what is no bench, and no model of it."""
    folder = Path(folder)
    scores, rows = load(folder)
    try:
        names = [m["name"] for m in scores["models"]]
        chosen = model or scores["student"]
    except (KeyError, TypeError):
        raise UserError(f"{folder}/scores.json is not from `danceopd bench`; name a bench folder") from None
    if chosen not in names:
        what = "student" if chosen is None else f"model {chosen!r}"
        raise UserError(f"bench {folder} has no {what}{nearest(chosen or '', names)}; choose one with --models")
    mine = [row for row in rows if row["model"] == chosen]
    if not mine:
        raise UserError(f"bench {folder} has no rows of {chosen!r}; choose another model with --models")
    return Side(folder, chosen, scores, mine)


def differing(a: Side, b: Side) -> list[str]:
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
        told = [f"{key} {_short(mine.get(key))} and {_short(theirs.get(key))}" for key in keys[:3]]
        words.append(f"judge ({', '.join(told) if mine and theirs else 'only one bench has one'})")
    if one["seed"] == other["seed"]:
        seeds = {_place(row): row.get("seed") for row in b.rows}
        apart = sum(_place(row) in seeds and seeds[_place(row)] != row.get("seed") for row in a.rows)
        if apart:
            words.append(f"seeds of {apart} items")
    return words


def _judge(identity: Any) -> Any:
    """Who judged. Recorded answers stand for the judge that gave them, where the record says which."""
    if not isinstance(identity, Mapping) or identity.get("kind") != "replay":
        return identity
    recorded = identity.get("recorded") or []
    return recorded[0] if len(recorded) == 1 else {"kind": "replay", "recorded": recorded}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _place(row: Mapping[str, Any]) -> tuple:
    """What makes two rows the same item: a key alone could stand for another task."""
    return row["capability"], row["category"], row["key"], row.get("prompt")


def versus(a: Side, b: Side, anyway: bool = False) -> dict[str, Any]:
    """The comparison as plain JSON; see `compare.difference` for its figures.

    `capabilities`: by name `a` and `b` (summaries of the common items), `difference`, `metrics`. `probes` and
    `heldout`, apart, have a difference each. `items`: every common item with both scores and pictures, the first
    model's losses first. `only`: items that just one bench has. `warnings`: what should be equal and is not, taken
    with `anyway` only; `notes`: what else differs. UserError names what is not equal, or says that no item is common.
    """
    if (a.folder.resolve(), a.model) == (b.folder.resolve(), b.model):
        raise UserError(f"both sides are {a.model!r} of {a.folder}; name two benches, or two models with --models a,b")
    warnings = differing(a, b)
    if warnings and not anyway:
        raise UserError(
            f"{a.folder} and {b.folder} were not asked alike, since they differ in {'; '.join(warnings)}; bench both "
            "alike, or add --anyway to compare what they have in common"
        )
    ones, others = ({_place(row): row for row in s.rows} for s in (a, b))
    common = [place for place in ones if place in others]
    if not common:
        raise UserError(f"{a.folder} and {b.folder} have no item in common; compare benches of one suite")
    rows = [found[place] | {"model": name} for name, found in (("a", ones), ("b", others)) for place in common]
    suite = a.scores["suite"]
    kinds = {c: _kind(suite, c) for c in dict.fromkeys(row["capability"] for row in rows)}
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
        "capabilities": {c: found for c, kind in kinds.items() if (found := _capability(rows, c, **kind))},
        "probes": _apart(rows, kinds, "probe", {r["probe"]: r["capability"] for r in rows if r.get("probe")}),
        "heldout": _heldout(rows, kinds),
        "items": _items([(ones[place], others[place]) for place in common]),
    }


def _kind(suite: Mapping[str, Any], capability: str) -> dict[str, Any]:
    """`share` and `scale` of a capability, as the suite recorded them."""
    scale = (suite.get("scale") or {}).get(capability)
    return {"share": (suite.get("share") or {}).get(capability), "scale": tuple(scale) if scale else None}


def _about(s: Side) -> dict[str, Any]:
    kept = {key: s.about.get(key) for key in ("label", "role", "path", "sha256")}
    return {"folder": str(s.folder), "model": s.model, "created": s.scores.get("created")} | kept


def _notes(a: Side, b: Side) -> list[str]:
    """What differs and need not be equal."""
    found = []
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
    rows: Sequence[dict], capability: str, share: bool | None, scale: compare.Scale | None
) -> dict[str, Any] | None:
    """Both summaries, the paired difference, and that of every metric that both have."""
    found = compare.delta(rows, "a", "b", capability, share, scale)
    if found is None:
        return None
    metrics = {}
    for name in dict.fromkeys(n for row in rows if row["capability"] == capability for n in row.get("metrics") or ()):
        one, other = (compare.scores_of(rows, side, capability, partial(_metric, name)) for side in "ab")
        figure = compare.difference(one, other, (0.0, 0.0))  # a metric has no ends that a failure could stand for
        if figure and figure["n"]:
            metrics[name] = {key: figure[key] for key in ("mean", "low", "high", "n", "p")}
    sums = {side: compare.summary(rows, side, capability, share, scale) for side in "ab"}
    return {**sums, "difference": found, "metrics": metrics}


def _apart(rows: Sequence[dict], kinds: Mapping[str, dict], what: str, names: Mapping[Any, str]) -> dict[str, dict]:
    """The difference of the rows whose `what` is a name, by that name; `names` says its capability."""
    found = {}
    for name, capability in names.items():
        kind = kinds[capability]
        scale = compare.scale_of(capability == "generation" if kind["share"] is None else kind["share"], kind["scale"])
        one, other = (compare.scores_of(rows, side, capability, wanted=partial(_is, what, name)) for side in "ab")
        if figure := compare.difference(one, other, scale):
            found[str(name)] = {"capability": capability} | figure
    return found


def _heldout(rows: Sequence[dict], kinds: Mapping[str, dict]) -> dict[str, dict]:
    """capability -> the difference of the held-out items."""
    parts = {c: _apart(rows, kinds, "heldout", {True: c}) for c in kinds}
    return {capability: part["True"] for capability, part in parts.items() if part}


def _items(pairs: Sequence[tuple[dict, dict]]) -> list[dict]:
    """Both scores of every item and where its pictures are, the first model's worst loss first."""
    found = []
    for one, other in pairs:
        mine, theirs = compare.score_of(one), compare.score_of(other)
        apart = None if mine is None or theirs is None else mine - theirs
        kept = {key: one.get(key) for key in ("capability", "category", "key", "prompt", "probe", "heldout")}
        pictures = {"a_image": one.get("image"), "b_image": other.get("image")}
        found.append(kept | {"a": mine, "b": theirs, "difference": apart} | pictures)
    return sorted(found, key=lambda item: (item["difference"] is None, item["difference"] or 0.0))


def pairs(a: Side, b: Side) -> list[Pair]:
    """The common ordinary items, for a judge to vote on."""
    others = {_place(row): row for row in b.rows}
    return [
        Pair(
            key=row["key"],
            capability=row["capability"],
            category=row["category"],
            prompt=row["prompt"],
            a=a.path(row.get("image")),
            b=b.path(others[_place(row)].get("image")),
            source=a.path(row.get("source")),
        )
        for row in a.rows
        if _place(row) in others and compare.ordinary(row)
    ]
