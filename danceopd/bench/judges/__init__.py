"""Judges: who is asked about a picture, and how its answers are kept.

A judge is an OpenAI-compatible endpoint, a local vision-language model, a program, or a file of recorded answers.
``Session`` asks it: every answer is one line in a file as soon as it comes, an interrupted run goes on without
asking again, and a run never costs more than it was given.
"""

from __future__ import annotations

from danceopd.bench.judges.agreement import agreement_of_files
from danceopd.bench.judges.named import judge_named
from danceopd.bench.judges.question import Answer, Judge, Question, Quote, Reads, Status
from danceopd.bench.judges.session import Estimate, Session

__all__ = [
    "Answer",
    "Estimate",
    "Judge",
    "Question",
    "Quote",
    "Reads",
    "Session",
    "Status",
    "agreement_of_files",
    "judge_named",
]
