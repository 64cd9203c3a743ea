"""The worst items of a bench by name, and the words of the prompts that go with the largest losses.

Means hide what a merge forgot: FID can stay flat while one class loses 19 points (DriftScope, arXiv 2607.00183). A loss
is the student's score minus that of the best teacher of the item's category, else minus the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from danceopd.bench import statistics
from danceopd.bench.interference import LEAST_ITEMS
from danceopd.bench.report import facts

SHOWN = 5
MOST = 0.6
"""A word in a larger share of the prompts says nothing about an item."""
WORD = re.compile(r"[^\W\d_]{3,}")
STOP = frozenset("the and with make this that from into photo image picture its for are all one".split())


def worst(scores: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Capability -> {items, words, against}: at most five of each with a loss, the largest loss first.

    `items` are the records of `report.items.items_of`, of which ordinary ones count. A word is {name, n, mean, low,
    high}: the mean loss of the n items that have it in their prompt, 6 at least, with its 95 % interval. Words of the
    same items are one entry. Languages without spaces have no words. `against`: with whom items were compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for capability in facts.capabilities(scores):
        losses: list[tuple[Mapping[str, Any], float]] = []
        against = set[str]()
        for item in items:
            kind = "teacher" if item["teacher"]["gain"] is not None else "base"
            if item["capability"] == capability and item[kind]["gain"] is not None and _ordinary(item):
                losses.append((item, item[kind]["gain"]))
                against.add(kind)
        if losses:
            losses.sort(key=lambda loss: loss[1])
            words = _words(losses, facts.span(scores, capability))
            whom = "the best teacher of each category" if "teacher" in against else "the base"
            lost = [item for item, gain in losses if gain < 0][:SHOWN]
            found[capability] = {"items": lost, "words": words, "against": whom}
    return found


def _ordinary(item: Mapping[str, Any]) -> bool:
    return not item["probe"] and not item["heldout"]


def _words(losses: Sequence[tuple[Mapping[str, Any], float]], span: float) -> list[dict[str, Any]]:
    """The words with the lowest mean difference below zero."""
    places: dict[str, dict[str, float]] = {}
    for number, (item, gain) in enumerate(losses):
        for word in dict.fromkeys(WORD.findall(str(item["prompt"]).lower())):
            if word not in STOP:
                places.setdefault(word, {})[str(number)] = gain
    groups: dict[tuple[str, ...], list[str]] = {}  # the items -> the words that stand in just these
    for word, of in places.items():
        if LEAST_ITEMS <= len(of) <= MOST * len(losses):
            groups.setdefault(tuple(of), []).append(word)
    means = {numbers: sum(losses[int(n)][1] for n in numbers) / len(numbers) for numbers in groups}
    found = []
    for numbers in sorted((n for n in groups if means[n] < 0), key=lambda n: means[n])[:SHOWN]:
        gains: dict[str, float | None] = {n: losses[int(n)][1] for n in numbers}
        figure = statistics.difference({"": gains}, {"": dict.fromkeys(gains, 0.0)}, (0.0, span))
        if figure:
            name = ", ".join(groups[numbers][:3])
            found.append({"name": name} | {key: figure[key] for key in ("mean", "low", "high", "n")})
    return found
