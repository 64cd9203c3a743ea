"""Votes of people on pairs of images: files of the blind page come in, preferences and agreement come out.

A person saw each pair without names and in a random order (pages/blind.py). What the votes mean is in `blind.json`,
which stays with whoever made the page. A pair's vote is the mean of all persons': 1 for the first model, -1 for the
second. Agreement of two persons, and of the judge with people, is the share of equal votes and Cohen's kappa; the judge
is compared where both it and people prefer a side (as in GEditBench v2, arXiv 2603.28547).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from danceopd.bench import statistics
from danceopd.bench.judges.agreement import agreement
from danceopd.bench.judges.protocol import Answer
from danceopd.bench.pairwise import tally
from danceopd.errors import UserError

FORMAT = "danceopd-votes/1"
CHOICES = {"left": 1, "tie": 0, "right": -1}
Place = tuple[str, str, str]
"""(capability, category, key) of a pair."""


def read_votes(files: Sequence[Path], blind: Mapping[str, Any]) -> dict[str, dict[Place, int]]:
    """Voter -> pair -> 1 (the first model is better), -1 (the second) or 0; `blind` is the contents of blind.json.

    Of a voter with several files the last vote on a pair counts. UserError for a file that is damaged, or of another
    page.
    """
    found: dict[str, dict[Place, int]] = {}
    for file in files:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            if read["format"] != FORMAT:
                raise ValueError(f"format {str(read['format'])[:40]!r}")
            page, voter = str(read["page"]), str(read["voter"]).strip()[:80] or str(file)
            votes = [(int(vote["pair"]), CHOICES[vote["vote"]]) for vote in read["votes"]]
        except FileNotFoundError:
            raise UserError(f"there is no file of votes {file}; give what the page saved") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file} is no file of votes ({type(error).__name__}: {str(error)[:100]}); give the JSON that the "
                "blind page saved"
            ) from None
        if page != blind["page"]:
            raise UserError(f"{file} has votes on another page ({page[:12]}) than blind.json ({blind['page'][:12]})")
        for number, vote in votes:
            if not 0 <= number < len(blind["pairs"]):
                raise UserError(f"{file} votes on pair {number}, and the page has {len(blind['pairs'])}")
            pair = blind["pairs"][number]
            place = _place(pair)
            found.setdefault(voter, {})[place] = -vote if pair["swapped"] else vote
    return found


def people(
    votes: Mapping[str, Mapping[Place, int]], items: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Plain JSON: `voters` (name -> votes), `capabilities` (figures as of `pairwise.tally`), `agreement`.

    `items` are those of `compare`, with the difference of the judge's scores; `judged` the judge's own votes on pairs.
    `agreement` has `voters` (persons with each other), `scores` (the bench's scores with people) and `votes` (the
    judge's votes with people), each {n, agree, low, high, kappa} or None where there is nothing to compare.
    """
    by_pair: dict[Place, list[int]] = {}
    for mine in votes.values():
        for place, vote in mine.items():
            by_pair.setdefault(place, []).append(vote)
    rows: list[dict[str, Any]] = [
        {"capability": c, "category": category, "key": key, "vote": sum(given) / len(given), "orders": [None]}
        for (c, category, key), given in by_pair.items()
    ]
    figures = {c: tally(rows, c) for c in dict.fromkeys(row["capability"] for row in rows)}
    whole = {place: sum(given) / len(given) for place, given in by_pair.items()}
    scored = {_place(item): item["difference"] for item in items if item["difference"] is not None}
    voted = {_place(vote): vote["vote"] for vote in judged if vote["vote"] is not None}
    each = [
        (one[place], other[place])
        for one, other in combinations(votes.values(), 2)
        for place in one
        if place in other
    ]
    about = {
        "voters": _agreement(each),
        "scores": _agreement([(whole[p], scored[p]) for p in whole if p in scored], sides_only=True),
        "votes": _agreement([(whole[p], voted[p]) for p in whole if p in voted], sides_only=True),
    }
    return {"voters": {name: len(of) for name, of in votes.items()}, "capabilities": figures, "agreement": about}


def _place(row: Mapping[str, Any]) -> Place:
    """Pairs of keys that stand in several categories carry the category in front; items do not."""
    return row["capability"], row["category"], row["key"].removeprefix(f"{row['category']}/")


def _agreement(pairs: Sequence[tuple[float, float]], sides_only: bool = False) -> dict[str, Any] | None:
    """Agreement of the signs; with `sides_only`, of the pairs in which neither is a tie."""
    signs = [((a > 0) - (a < 0), (b > 0) - (b < 0)) for a, b in pairs]
    signs = [pair for pair in signs if not sides_only or 0 not in pair]
    if not signs:
        return None
    share = statistics.mean([float(a == b) for a, b in signs], share=True)
    choices = [("", Answer("", "ok", choice=str(a)), Answer("", "ok", choice=str(b))) for a, b in signs]
    kappa = agreement(choices)[""]["kappa"]
    return {"n": len(signs), "agree": share["mean"], "low": share["low"], "high": share["high"], "kappa": kappa}


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What people preferred and how far they agree, a line each."""
    made = [f"people: {', '.join(f'{name} ({count} pairs)' for name, count in found['voters'].items())}"]
    what = {"voters": "people with each other", "scores": "the bench's scores with people"}
    what["votes"] = "the judge's votes with people"
    for key, words in what.items():
        of = found["agreement"].get(key)
        if of:
            kappa = "" if of["kappa"] is None else f", kappa {of['kappa']:.2f}"
            interval = f"95 % interval {of['low']:.0%} to {of['high']:.0%}"
            made.append(f"agreement of {words}: {of['agree']:.0%} of {of['n']} pairs ({interval}{kappa})")
    if "votes" in found["agreement"] and not any(found["agreement"][key] for key in ("scores", "votes")):
        made.append("agreement of the judge with people: not known, since no pair has a preference of both")
    return made
