"""Agreement of two judges, or of two answers of one judge, about the same questions.

Pairs of answers go in, figures by aspect come out. Numbers get exact agreement, mean absolute difference,
quadratic-weighted kappa (Cohen 1968) and Spearman's rank correlation; choices get exact agreement and Cohen's kappa.
Kappa is 1 for equal answers and 0 for agreement by chance alone: 1 - mean (a_i - b_i)^2 / mean over all i, j of
(a_i - b_j)^2, which needs no bins. It is None where neither side varies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from danceopd.bench.judges.answers import LoggedAnswer, read_log
from danceopd.bench.judges.protocol import Answer
from danceopd.errors import UserError

AnswerPair = tuple[str, Answer, Answer]  # (aspect, one answer, the other)


def agreement(pairs: Iterable[AnswerPair]) -> dict[str, dict[str, Any]]:
    """Aspect -> figures over its pairs of answers.

    ``n`` counts the pairs with two usable answers, ``unread`` the others. An answer of several
    numbers counts as several ratings; ``exact`` is the share of pairs equal in all of them.
    """
    grouped: dict[str, list[tuple[Answer, Answer]]] = defaultdict(list)
    for aspect, one, other in pairs:
        grouped[aspect].append((one, other))
    return {aspect: _figures(held) for aspect, held in sorted(grouped.items())}


def agreement_of_files(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """The same for two files of answers (two judges, or one judge twice), paired by key and repeat."""
    sides = []
    for file in (first, second):
        if not file.is_file():
            raise UserError(f"there is no file of answers {file}; give the judge.jsonl of a bench")
        sides.append({(line.answer.key, line.answer.repeat): line for line in read_log(file)})
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        raise UserError(f"{first} and {second} have no question in common; compare two judges on the same images")
    return agreement((_aspect(sides[0][key]), sides[0][key].answer, sides[1][key].answer) for key in shared)


def _aspect(line: LoggedAnswer) -> str:
    return line.aspect or line.answer.key.rpartition("/")[2]


def _figures(pairs: list[tuple[Answer, Answer]]) -> dict[str, Any]:
    read = [(a, b) for a, b in pairs if a.status == b.status == "ok" and _kind(a) == _kind(b)]
    figures: dict[str, Any] = {"n": len(read), "unread": len(pairs) - len(read)}
    if not read:
        return figures
    figures["exact"] = float(np.mean([(a.numbers, a.choice) == (b.numbers, b.choice) for a, b in read]))
    if read[0][0].numbers is None:
        labels = sorted({answer.choice or "" for pair in read for answer in pair})
        one, other = (np.array([labels.index(pair[side].choice or "") for pair in read]) for side in (0, 1))
        chance = sum(float((one == label).mean() * (other == label).mean()) for label in range(len(labels)))
        return {**figures, "kappa": None if chance == 1 else (figures["exact"] - chance) / (1 - chance)}
    one, other = (np.array([n for pair in read for n in pair[side].numbers or ()]) for side in (0, 1))
    chance = float(((one[:, None] - other[None, :]) ** 2).mean())
    figures["difference"] = float(np.abs(one - other).mean())
    figures["kappa"] = None if chance == 0 else 1 - float(((one - other) ** 2).mean()) / chance
    figures["spearman"] = _spearman(one, other)
    return figures


def _kind(answer: Answer) -> int | None:
    return None if answer.numbers is None else len(answer.numbers)


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's correlation of the ranks, ties at their mean rank; None where a side never varies."""
    a, b = _ranks(one), _ranks(other)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
