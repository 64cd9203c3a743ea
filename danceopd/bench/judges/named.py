"""A judge by the name that a user types."""

from __future__ import annotations

import inspect
import re
from typing import Any

from danceopd.bench.judges.question import Judge
from danceopd.errors import UserError
from danceopd.sentences import nearest

FLAGS = {
    "key_file": "--judge-key-file",
    "price_in": "--price-in",
    "price_out": "--price-out",
}
"""Options of a judge whose flag is not --judge-NAME."""
KINDS = {
    "openai": "an OpenAI-compatible endpoint, as openai:gpt-4.1-2025-04-14@https://api.openai.com/v1",
    "hf": "a local vision-language model, as hf:./Qwen2.5-VL-7B-Instruct",
    "cmd": "a program, as cmd:'python score.py'",
    "replay": "recorded answers, as replay:judge.jsonl",
}
"""What may stand before the colon, and what it is."""


def judge_named(text: str, **options: Any) -> Judge:
    """The judge of "openai:MODEL@URL", "hf:FOLDER", "cmd:PROGRAM" or "replay:FILE".

    ``options`` are those of the judge's class, None for what was not given: of an endpoint ``url``, ``key_file``,
    ``temperature``, ``codec`` ("png", "jpeg:75"), ``longest``, ``detail``, ``concurrency``, ``timeout``, ``tries``,
    ``price_in``, ``price_out``, ``thinking``; of a local model ``device``, ``dtype``, ``batch``, ``longest``; of a
    program ``timeout``. UserError names the kinds for an unknown one, and the flag that a judge does not take.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest.strip():
        known = "; ".join(KINDS.values())
        hint = nearest(kind, KINDS) if kind not in KINDS else "; something must follow the colon"
        raise UserError(f"judge {text!r} is not understood{hint} ({known})")
    given = {key: value for key, value in options.items() if value is not None}
    made: Any
    if kind == "openai":
        from danceopd.bench.judges.endpoint import Endpoint as made

        match = re.fullmatch(r"(.*?)(?:@(https?://.+))?", rest.strip())
        assert match is not None
        rest = match[1]
        if match[2]:
            given["url"] = match[2]
    elif kind == "hf":
        from danceopd.bench.judges.local import Local as made
    elif kind == "cmd":
        from danceopd.bench.judges.program import Program as made
    else:
        from danceopd.bench.judges.recorded import Recorded as made
    for key in given:
        if key not in inspect.signature(made).parameters:
            flag = FLAGS.get(key, f"--judge-{key.replace('_', '-')}")
            raise UserError(f"judge {kind}: takes no {flag}; leave it out")
    return made(rest.strip(), **given)
