"""One pass over the questions: each asked once, each answer on disk at once, never past the budget.

A question is known by the hash of its content, so a run that was interrupted goes on, and equal questions of one run
are asked once. Before a question goes out, the most that it may cost is reserved; when what was spent and what is
reserved leave no room for the next, nothing more goes out until answers have freed some, and the pass ends when they
do not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from danceopd.bench.judges.ledger import Ledger, reread
from danceopd.bench.judges.question import Answer, Judge, Question, content_hash
from danceopd.errors import UserError

Progress = Callable[[Answer], None]


class Asking:
    """``going_out`` is what the judge takes its questions from, ``settle`` takes every answer that comes."""

    def __init__(
        self,
        judge: Judge,
        ledger: Ledger,
        source: Iterator[Question],
        max_cost: float | None,
        progress: Progress | None,
    ) -> None:
        self.judge, self.ledger, self.source = judge, ledger, source
        self.max_cost, self.progress = max_cost, progress
        self.known = dict(ledger.answers)
        self.out: dict[tuple[str, int], tuple[str, Question, float]] = {}  # (key, repeat) -> hash, question, dollars
        self.equals: dict[str, list[Question]] = {}  # hash of one that is out -> the others that wait for its answer
        self.held: tuple[str, Question] | None = None  # the next one, for which there was no room
        self.given: dict[str, dict[int, Answer]] = defaultdict(dict)
        self.aspects: dict[str, str] = {}
        self.came: list[Answer] = []
        self.sent = 0
        self.dearer = 1.0  # how many times the most that was quoted an answer has cost

    def going_out(self) -> Iterator[Question]:
        """The questions that have to be asked, while there is room for them."""
        while (taken := self._next()) is not None:
            hash, question = taken
            if hash in self.known:
                self._give_known(hash, question)
            elif hash in self.equals:
                self.equals[hash].append(question)
            elif (dollars := self._reserve(question)) is None:
                self.held = taken
                return
            else:
                if (question.key, question.repeat) in self.out:
                    raise ValueError(f"two different questions have the key {question.key}")
                self.out[question.key, question.repeat] = hash, question, dollars
                self.equals[hash] = []
                self.sent += 1
                yield question

    def settle(self, answer: Answer) -> None:
        """Writes an answer, and gives it to all who asked the same."""
        hash, question, reserved = self.out.pop((answer.key, answer.repeat))
        if reserved and (answer.cost or 0.0) > reserved:
            self.dearer *= (answer.cost or 0.0) / reserved
        self.known[hash] = answer
        self.came.append(answer)
        self.ledger.add(hash, question, answer)
        self._give(question, answer)
        for equal in self.equals.pop(hash):
            self._give_known(hash, equal)

    def finish(self) -> str | None:
        """What was not asked is missing; the sentence that says why, or None."""
        unasked = 0
        for _, question, _ in self.out.values():  # a judge that is done and owes an answer
            self._give(question, Answer(question.key, "failed", text="no answer came", repeat=question.repeat))
        while (taken := self._next()) is not None:
            hash, question = taken
            if hash in self.known:
                self._give_known(hash, question)
            else:
                unasked += 1
                self._give(question, Answer(question.key, "missing", text="not asked", repeat=question.repeat))
        if not unasked:
            return None
        return (
            f"{unasked} questions were not asked, because the next one could pass --max-cost {self.max_cost:g} "
            f"(${self.ledger.spent:.4g} is spent); raise it and run the same command again to go on"
        )

    def usage(self) -> dict[str, Any]:
        """Plain figures of this pass; ``cost`` is None where a price is not known, ``spent`` is the file's total."""
        costs = [answer.cost for answer in self.came]
        return {
            "answers": sum(len(held) for held in self.given.values()),
            "asked": len(self.came),
            "statuses": dict(Counter(answer.status for held in self.given.values() for answer in held.values())),
            "attempts": sum(answer.attempts for answer in self.came),
            "tokens_in": sum(answer.tokens_in for answer in self.came),
            "tokens_out": sum(answer.tokens_out for answer in self.came),
            "cost": None if None in costs else sum(cost or 0.0 for cost in costs),
            "spent": self.ledger.spent,
            "judges": dict(Counter(a.judge for held in self.given.values() for a in held.values() if a.judge)),
        }

    def _next(self) -> tuple[str, Question] | None:
        held, self.held = self.held, None
        if held is not None:
            return held
        question = next(self.source, None)
        if question is None:
            return None
        return content_hash(self.judge.identity, self.judge.sees, question), question

    def _reserve(self, question: Question) -> float | None:
        """The most it may cost, if there is room for it beside all that is spent and out."""
        if self.max_cost is None:
            return 0.0
        at_most = self.judge.quote(question).at_most
        if at_most is None:
            raise UserError(
                f"the price of judge {self.judge.name} is not known, so --max-cost cannot be kept; give --price-in and "
                "--price-out (dollars a million tokens)"
            )
        dollars = at_most * self.dearer
        taken = self.ledger.spent + sum(reserved for _, _, reserved in self.out.values())
        return dollars if taken + dollars <= self.max_cost else None

    def _give_known(self, hash: str, question: Question) -> None:
        """An answer that is there already, under this question's key; the file learns that key too."""
        answer = reread(self.known[hash], question)
        if (hash, question.key) not in self.ledger.keys and answer.status != "failed":
            answer = replace(answer, attempts=0, tokens_in=0, tokens_out=0, cost=0.0, seconds=0.0)
            self.ledger.add(hash, question, answer)
        self._give(question, answer)

    def _give(self, question: Question, answer: Answer) -> None:
        self.given[question.key][question.repeat] = answer
        self.aspects[question.key] = question.aspect
        if self.progress is not None:
            self.progress(answer)
