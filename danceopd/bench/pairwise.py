"""Pairwise preference: a judge sees two models' images of an item in both orders, and votes for one of them.

As in GenAI-Arena (Jiang et al. 2024), with prompts of our own. A vote counts only if both orders give it; if the order
changes it, the pair is a tie, so a judge that always prefers the first image decides nothing. The share of pairs on
which the orders disagree is reported as the judge's `position` bias. A pair without an answer in both orders is a
failure, not a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danceopd.bench import statistics
from danceopd.bench.judges.protocol import Answer, Question, Reads

ASPECT = "pair"
CHOICES = ("A", "B", "tie")
ORDERS = ("ab", "ba")
MEANING = {"ab": {"A": 1, "B": -1, "tie": 0}, "ba": {"A": -1, "B": 1, "tie": 0}}
"""Order -> choice -> the vote: 1 for the first model, -1 for the second, 0 for a tie."""
SYSTEM = (
    "You compare two pictures that two image models made for the same request. Look closely and be impartial: the "
    "order in which the pictures are shown means nothing. Judge only what can be seen."
)
EDIT_PROMPT = (
    "The first picture is the source. Picture A and picture B are two attempts to edit it by this instruction:\n"
    "{prompt}\n"
    "The better edit does all that the instruction asks, leaves everything else as it was in the source, and looks "
    "whole and natural. An attempt that did not do what was asked loses to one that did."
)
GENERATION_PROMPT = (
    "Picture A and picture B were both drawn for this description:\n"
    "{prompt}\n"
    "The better picture shows all that the description names, with the right number, colours and places, and is well "
    "made. A picture that misses part of the description loses to one that does not."
)
FINAL_PROMPT = (
    "Which one is better? If neither is clearly better, say tie. Answer with one JSON object and nothing else: "
    '{"reasoning": "one or two sentences", "choice": "A" or "B" or "tie"}'
)


@dataclass(frozen=True)
class Pair:
    """One item and the images of two models: `a` and `b` are paths, None for a missing image."""

    key: str
    capability: str
    category: str
    prompt: str
    a: Path | None
    b: Path | None
    source: Path | None = None


def questions(pairs: Sequence[Pair]) -> Iterator[Question]:
    """Two questions for each pair with both images; their keys are `pair/CAPABILITY/ITEM/ORDER`."""
    for pair in pairs:
        if pair.a is None or pair.b is None:
            continue
        text = (GENERATION_PROMPT if pair.source is None else EDIT_PROMPT).format(prompt=pair.prompt)
        before = () if pair.source is None else ("Source:", pair.source)
        for order in ORDERS:
            first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
            yield Question(
                key=_key(pair, order),
                aspect=ASPECT,
                parts=(text, *before, "Picture A:", first, "Picture B:", second, FINAL_PROMPT),
                reads=Reads(choices=CHOICES),
                system=SYSTEM,
                facts={"item": pair.key, "order": order, "prompt": pair.prompt},
                max_tokens=400,
            )


def _key(pair: Pair, order: str) -> str:
    return f"pair/{pair.capability}/{pair.key}/{order}"


def _preference(answers: Sequence[Answer], order: str) -> int | None:
    """The vote of one order: that of most repeats, 0 for a draw, None without a usable answer."""
    votes = Counter(MEANING[order][a.choice] for a in answers if a.status == "ok" and a.choice in MEANING[order])
    if not votes:
        return None
    (top, count), *others = votes.most_common()
    return 0 if others and others[0][1] == count else top


def vote(pair: Pair, answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """One pair's vote as plain JSON: `vote` 1 (the first model), -1, 0 (tie) or None (failed), `orders`, reasons."""
    given = {order: answers.get(_key(pair, order), ()) for order in ORDERS}
    votes = [_preference(given[order], order) for order in ORDERS]
    status = "ok"
    if pair.a is None or pair.b is None:
        status = "missing"
    elif None in votes:
        bad = [a.status for order, one in zip(ORDERS, votes) if one is None for a in given[order] if a.status != "ok"]
        status = bad[0] if bad else "missing"
    result = None if status != "ok" else votes[0] if votes[0] == votes[1] else 0
    return {
        "capability": pair.capability,
        "category": pair.category,
        "key": pair.key,
        "vote": result,
        "orders": votes,
        "status": status,
        "reasons": [_why(given[order]) for order in ORDERS],
    }


def _why(answers: Sequence[Answer]) -> str:
    """The judge's reasoning, or of an answer that cannot be used what came instead."""
    return answers[0].reasoning or (answers[0].text if answers[0].status != "ok" else "") if answers else ""


def tally(votes: Sequence[dict], capability: str) -> dict[str, Any] | None:
    """The votes of one capability as a figure of `statistics.difference`, from -1 (the second model) to 1.

    `wins` are the first model's. `position`: of the pairs with an answer in both orders, the share on which the orders
    disagree. None without a pair.
    """
    mine = [v for v in votes if v["capability"] == capability]
    by_category: dict[str, dict[str, float | None]] = {}
    for found in mine:
        by_category.setdefault(found["category"], {})[found["key"]] = found["vote"]
    zeros = {category: dict.fromkeys(values, 0.0) for category, values in by_category.items()}
    figure = statistics.difference(by_category, zeros, (0.0, 1.0))  # differences on this scale go from -1 to 1
    if figure is None:
        return None
    both = [v["orders"] for v in mine if None not in v["orders"]]
    return figure | {"position": sum(one != other for one, other in both) / len(both) if both else None}
