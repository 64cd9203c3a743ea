"""A session with a judge: questions in, answers out, and a file that is always as far as the answers are.

Repeats ask the same again and are kept apart, so that a judge's agreement with itself can be told. What a run would
take can be known before anything is asked; how questions go out, and stay in the budget, is in ``asking``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from danceopd.bench.judges.agreement import agreement
from danceopd.bench.judges.asking import Asking, Progress
from danceopd.bench.judges.ledger import Ledger
from danceopd.bench.judges.question import Answer, Judge, Question, content_hash
from danceopd.errors import UserError


@dataclass
class Estimate:
    """What asking would take. ``cost`` is what is expected, ``at_most`` the most it can be; None: price not known."""

    questions: int = 0
    recorded: int = 0  # answered already, in the file
    equal: int = 0  # the same as another question
    to_ask: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    at_most: float | None = 0.0


class Session:
    """Questions to one judge, with the file of its answers.

    ``repeats`` asks everything that many times. ``max_cost`` (US dollars) is for all that the file has cost so far.
    After ``answers``, ``stopped`` is the sentence that says why not all was asked (or None), and ``usage`` counts.
    """

    def __init__(self, judge: Judge, file: str | Path, repeats: int = 1, max_cost: float | None = None) -> None:
        if repeats < 1:
            raise UserError(f"--repeats is {repeats}; ask at least once")
        if repeats > 1 and judge.deterministic:
            raise UserError(
                f"judge {judge.name} answers the same every time, so --repeats {repeats} says no more; leave it out"
            )
        if max_cost is not None and not max_cost > 0:
            raise UserError(f"--max-cost is {max_cost}; give dollars above zero")
        self.judge, self.file, self.repeats, self.max_cost = judge, Path(file), repeats, max_cost
        self.stopped: str | None = None
        self.usage: dict[str, Any] = {}
        self._answers: dict[str, list[Answer]] = {}
        self._aspects: dict[str, str] = {}

    def answers(self, questions: Iterable[Question], progress: Progress | None = None) -> dict[str, list[Answer]]:
        """Key -> its answers, one for each repeat; what was not asked has the status "missing".

        ``questions`` is taken one by one, so a generator keeps few pictures in memory. ``progress`` is called with
        every answer, those from the file too. UserError when the judge cannot go on; the file keeps what came.
        """
        with Ledger(self.file, self.judge) as ledger:
            asking = Asking(self.judge, ledger, self._repeated(questions), self.max_cost, progress)
            while True:
                before = asking.sent
                with closing(self.judge.ask(asking.going_out())) as coming:
                    for answer in coming:
                        asking.settle(answer)
                if asking.held is None or asking.sent == before:  # all are out, or not one more could go out
                    break
            self.stopped = asking.finish()
            self.usage = asking.usage()
        self._aspects = asking.aspects
        self._answers = {key: [held[n] for n in sorted(held)] for key, held in asking.given.items()}
        return self._answers

    def estimate(self, questions: Iterable[Question]) -> Estimate:
        """What ``answers`` would ask, and take; nothing is asked and nothing is written."""
        known = Ledger(self.file, self.judge).answers
        estimate, seen = Estimate(), set[str]()
        for question in self._repeated(questions):
            hash = content_hash(self.judge.identity, self.judge.sees, question)
            estimate.questions += 1
            if hash in known:
                estimate.recorded += 1
            elif hash in seen:
                estimate.equal += 1
            else:
                seen.add(hash)
                quote = self.judge.quote(question)
                estimate.to_ask += 1
                estimate.tokens_in += quote.tokens_in
                estimate.tokens_out += quote.tokens_out
                estimate.cost = _sum(estimate.cost, quote.cost)
                estimate.at_most = _sum(estimate.at_most, quote.at_most)
        return estimate

    def agreement(self) -> dict[str, dict[str, Any]]:
        """Aspect -> how far the repeats of the last ``answers`` agree, over all pairs of repeats."""
        return agreement(
            (self._aspects[key], one, other)
            for key, held in self._answers.items()
            for one, other in combinations(held, 2)
        )

    def _repeated(self, questions: Iterable[Question]) -> Iterator[Question]:
        return (replace(question, repeat=n) for question in questions for n in range(self.repeats))


def _sum(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more
