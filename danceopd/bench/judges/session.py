"""Asking a judge: questions in, answers out, all of them in a file that a later run continues.

`JudgeSession` is for callers; `QuestionQueue` decides what is sent. A question is sent only if its answer is not in the
file, an equal question about the same item (of another model) is not already on its way, and there is budget for its
highest price. Repeats ask the same question several times, so that the judge's agreement with itself can be reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, combinations, repeat
from pathlib import Path
from typing import Any

from danceopd.bench.judges.agreement import agreement
from danceopd.bench.judges.answers import AnswerLog, reparse
from danceopd.bench.judges.protocol import Answer, Judge, Question, content_hash
from danceopd.errors import UserError

OnAnswer = Callable[[Answer], None]


@dataclass
class CostEstimate:
    """What a session would ask and cost. ``cost`` is expected, ``at_most`` the highest; None: the price is unknown."""

    questions: int = 0
    recorded: int = 0  # already answered in the file
    equal: int = 0  # the same as another question about the item
    to_ask: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    at_most: float | None = 0.0


class JudgeSession:
    """One judge and the file of its answers.

    ``repeats``: how often everything is asked. ``max_cost``: the US dollars that the whole file may cost, earlier runs
    included. After ``answers``, ``stopped`` says why some questions were not asked (None: all were), ``usage`` counts.
    """

    def __init__(self, judge: Judge, file: str | Path, repeats: int = 1, max_cost: float | None = None) -> None:
        if repeats < 1:
            raise UserError(f"--repeats is {repeats}; give 1 or more")
        if repeats > 1 and judge.deterministic:
            raise UserError(f"judge {judge.name} always answers the same, so leave --repeats {repeats} out")
        if max_cost is not None and not max_cost > 0:
            raise UserError(f"--max-cost is {max_cost}; give a number of US dollars above zero")
        self.judge, self.file, self.repeats, self.max_cost = judge, Path(file), repeats, max_cost
        self.stopped: str | None = None
        self.usage: dict[str, Any] = {}
        self._answers: dict[str, list[Answer]] = {}
        self._aspects: dict[str, str] = {}

    def answers(self, questions: Iterable[Question], on_answer: OnAnswer | None = None) -> dict[str, list[Answer]]:
        """Question key -> its answers, one for each repeat; a question that was not asked has the status "missing".

        ``questions`` is consumed one by one, so a generator keeps few images in memory. ``on_answer`` is called with
        every answer, recorded ones too. UserError when the judge cannot go on; the file keeps what was answered.
        """
        with AnswerLog(self.file, self.judge) as log:
            queue = QuestionQueue(self.judge, log, self._repeated(questions), self.max_cost, on_answer)
            while True:
                before = queue.sent
                with closing(self.judge.ask(queue.to_send())) as received:
                    for answer in received:
                        queue.receive(answer)
                if queue.waiting is None or queue.sent == before:  # all are sent, or no budget for even one more
                    break
            self.stopped = queue.finish()
            self.usage = queue.usage()
        self._aspects = queue.aspects
        self._answers = {key: [repeats[n] for n in sorted(repeats)] for key, repeats in queue.answers.items()}
        return self._answers

    def estimate(self, questions: Iterable[Question], to_come: Iterable[Question] = ()) -> CostEstimate:
        """What ``answers`` would ask and cost; nothing is asked or written.

        ``to_come``: questions about images that do not exist yet, so that none of them is equal to another.
        """
        known = AnswerLog(self.file, self.judge).answers
        estimate, seen = CostEstimate(), set[tuple[str, str]]()
        every = chain(zip(self._repeated(questions), repeat(False)), zip(self._repeated(to_come), repeat(True)))
        for question, new in every:
            hash = "" if new else content_hash(self.judge.identity, self.judge.sees, question)
            estimate.questions += 1
            if hash in known:
                estimate.recorded += 1
            elif (hash, _item(question)) in seen:
                estimate.equal += 1
            else:
                seen |= set() if new else {(hash, _item(question))}
                quote = self.judge.quote(question)
                estimate.to_ask += 1
                estimate.tokens_in += quote.tokens_in
                estimate.tokens_out += quote.tokens_out
                estimate.cost = _sum(estimate.cost, quote.cost)
                estimate.at_most = _sum(estimate.at_most, quote.at_most)
        return estimate

    def agreement(self) -> dict[str, dict[str, Any]]:
        """Aspect -> agreement of the judge with itself, over all pairs of repeats of the last ``answers``."""
        return agreement(
            (self._aspects[key], one, other)
            for key, repeats in self._answers.items()
            for one, other in combinations(repeats, 2)
        )

    def summary(self) -> dict[str, Any]:
        """`repeats`, `usage`, `stopped` and `agreement` of the last ``answers``, as plain JSON."""
        found = {"repeats": self.repeats, "usage": self.usage, "stopped": self.stopped}
        return found | {"agreement": self.agreement()}

    def _repeated(self, questions: Iterable[Question]) -> Iterator[Question]:
        return (replace(question, repeat=n) for question in questions for n in range(self.repeats))


def _item(question: Question) -> str:
    """The item that a question is about: its key without the model and the aspect."""
    return question.key.partition("/")[2].rpartition("/")[0]


def _sum(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more


class QuestionQueue:
    """The questions of one pass: the judge takes them from ``to_send``, and each answer goes to ``receive``."""

    def __init__(
        self,
        judge: Judge,
        log: AnswerLog,
        questions: Iterator[Question],
        max_cost: float | None,
        on_answer: OnAnswer | None,
    ) -> None:
        self.judge, self.log, self.questions = judge, log, questions
        self.max_cost, self.on_answer = max_cost, on_answer
        self.known = dict(log.answers)  # by hash, of earlier passes
        self.given: dict[tuple[str, str], Answer] = {}  # (hash, item) -> the answer of this pass
        self.open: dict[tuple[str, int], tuple[str, Question, float]] = {}  # (key, repeat) -> hash, question, dollars
        self.equals: dict[tuple[str, str], list[Question]] = {}  # of an open question -> equal ones that wait for it
        self.waiting: tuple[str, Question] | None = None  # the next question, for which there was no budget
        self.answers: dict[str, dict[int, Answer]] = defaultdict(dict)  # key -> repeat -> answer
        self.aspects: dict[str, str] = {}
        self.received: list[Answer] = []
        self.sent = 0
        self.price_factor = 1.0  # how many times the highest quoted price an answer has cost

    def to_send(self) -> Iterator[Question]:
        """The questions that must be asked, while there is budget for them."""
        while (taken := self._next()) is not None:
            hash, question = taken
            place = hash, _item(question)
            if answer := self.known.get(hash) or self.given.get(place):
                self._answer_from(answer, hash, question)
            elif place in self.equals:
                self.equals[place].append(question)
            elif (dollars := self._reserve(question)) is None:
                self.waiting = taken
                return
            else:
                if (question.key, question.repeat) in self.open:
                    raise ValueError(f"two different questions have the key {question.key}")
                self.open[question.key, question.repeat] = hash, question, dollars
                self.equals[place] = []
                self.sent += 1
                yield question

    def receive(self, answer: Answer) -> None:
        """Log an answer, and give it to every equal question."""
        hash, question, reserved = self.open.pop((answer.key, answer.repeat))
        if reserved and (answer.cost or 0.0) > reserved:
            self.price_factor *= (answer.cost or 0.0) / reserved
        place = hash, _item(question)
        self.given[place] = answer
        self.received.append(answer)
        self.log.add(hash, question, answer)
        self._answer(question, answer)
        for equal in self.equals.pop(place):
            self._answer_from(answer, hash, equal)

    def finish(self) -> str | None:
        """Mark what was not asked as missing; returns the sentence that says why, or None when all was asked."""
        not_asked = 0
        for _, question, _ in self.open.values():  # the judge ended without answering these
            self._answer(question, Answer(question.key, "failed", text="no answer came", repeat=question.repeat))
        while (taken := self._next()) is not None:
            hash, question = taken
            if answer := self.known.get(hash) or self.given.get((hash, _item(question))):
                self._answer_from(answer, hash, question)
            else:
                not_asked += 1
                self._answer(question, Answer(question.key, "missing", text="not asked", repeat=question.repeat))
        if not not_asked:
            return None
        return (
            f"{not_asked} questions were not asked, because the next one could exceed --max-cost {self.max_cost:g} "
            f"(${self.log.spent:.4g} is spent); raise it and run the same command again to continue"
        )

    def usage(self) -> dict[str, Any]:
        """Counts and dollars of this pass; ``cost`` is None if a price is unknown, ``spent`` is the file's total."""
        costs = [answer.cost for answer in self.received]
        every = [answer for repeats in self.answers.values() for answer in repeats.values()]
        return {
            "answers": len(every),
            "asked": len(self.received),
            "statuses": dict(Counter(answer.status for answer in every)),
            "attempts": sum(answer.attempts for answer in self.received),
            "tokens_in": sum(answer.tokens_in for answer in self.received),
            "tokens_out": sum(answer.tokens_out for answer in self.received),
            "cost": None if None in costs else sum(cost or 0.0 for cost in costs),
            "spent": self.log.spent,
            "judges": dict(Counter(answer.judge for answer in every if answer.judge)),
        }

    def _next(self) -> tuple[str, Question] | None:
        """The next question with its hash: the one that waits for budget, else the next of the iterator."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            return waiting
        question = next(self.questions, None)
        if question is None:
            return None
        return content_hash(self.judge.identity, self.judge.sees, question), question

    def _reserve(self, question: Question) -> float | None:
        """The highest price of a question, if the budget has room for it besides what is spent and open; else None."""
        if self.max_cost is None:
            return 0.0
        at_most = self.judge.quote(question).at_most
        if at_most is None:
            raise UserError(
                f"the price of judge {self.judge.name} is unknown, so --max-cost cannot be kept; give --price-in and "
                "--price-out (dollars per million tokens)"
            )
        dollars = at_most * self.price_factor
        taken = self.log.spent + sum(reserved for _, _, reserved in self.open.values())
        return dollars if taken + dollars <= self.max_cost else None

    def _answer_from(self, given: Answer, hash: str, question: Question) -> None:
        """Answer a question from an equal one; the log gets a line with this question's key too."""
        answer = reparse(given, question)
        if (hash, question.key) not in self.log.keys and answer.status != "failed":
            answer = replace(answer, attempts=0, tokens_in=0, tokens_out=0, cost=0.0, seconds=0.0)
            self.log.add(hash, question, answer)
        self._answer(question, answer)

    def _answer(self, question: Question, answer: Answer) -> None:
        self.answers[question.key][question.repeat] = answer
        self.aspects[question.key] = question.aspect
        if self.on_answer is not None:
            self.on_answer(answer)
