"""Options of a bench that belong together: of the suite, the judge and the blends; plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danceopd.adapters.blending.methods import Method
    from danceopd.bench.judges.protocol import Judge


@dataclass(frozen=True)
class SuiteOptions:
    """What some suites take: a copy of the data, the language of instructions, prompts of the official code, and
    images for each prompt.
    """

    data: str | Path | None = None
    language: str | None = None
    official_prompts: str | Path | None = None
    samples: int | None = None


@dataclass(frozen=True)
class JudgeOptions:
    """Who scores a judged suite (`--judge`), and how.

    `judge`: a `Judge`, or what `judges.registry.load_judge` reads; "none" generates and measures without a judge.
    `arguments` are those of the judge's class. Everything is asked `repeats` times, for at most `max_cost` US dollars.
    A `second` judge is asked the same questions once, with its own default arguments, for at most as much again.
    """

    judge: str | Judge | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 1
    max_cost: float | None = None
    second: str | None = None


@dataclass(frozen=True)
class BlendOptions:
    """Which blends of the teachers' LoRAs are compared.

    `weights`: a list: for two teachers, several weights w of the first (the second gets 1 - w); a mapping: one weight
    for each teacher. `methods`: names as of `danceopd blend`, or `Method`s. The best blend is shown in the tables, the
    others in the report.
    """

    weights: Sequence[float] | Mapping[str, float] = ()
    methods: Sequence[str | Method] = ("linear",)
