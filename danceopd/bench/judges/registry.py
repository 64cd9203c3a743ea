"""The judge of a `--judge` option."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench.judges.protocol import Judge
from danceopd.common.messages import did_you_mean
from danceopd.common.system import redacted
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.bench.judges.session import JudgeSession

FLAGS = {
    "key_file": "--judge-key-file",
    "price_in": "--price-in",
    "price_out": "--price-out",
}
"""Options whose flag is not --judge-NAME."""
KINDS = {
    "openai": "an OpenAI-compatible endpoint, as openai:gpt-4.1-2025-04-14@https://api.openai.com/v1",
    "hf": "a local vision-language model, as hf:./Qwen2.5-VL-7B-Instruct",
    "cmd": "a program, as cmd:'python score.py'",
    "replay": "recorded answers, as replay:judge.jsonl",
}
"""What stands before the colon -> what it is, with an example."""


def open_session(
    text: str, file: Path, arguments: Mapping[str, Any], repeats: int = 1, max_cost: float | None = None
) -> JudgeSession:
    """A session of the judge of `load_judge`, whose answers are in `file`; nothing is asked yet."""
    from danceopd.bench.judges.session import JudgeSession

    return JudgeSession(load_judge(text, **arguments), file, repeats, max_cost)


def load_judge(text: str, **options: Any) -> Judge:
    """The judge of "openai:MODEL@URL", "hf:FOLDER", "cmd:PROGRAM" or "replay:FILE".

    ``options`` are arguments of the judge's class, None for what was not given: of an endpoint ``url``, ``key_file``,
    ``temperature``, ``codec`` ("png", "jpeg:75"), ``longest``, ``detail``, ``concurrency``, ``timeout``, ``tries``,
    ``price_in``, ``price_out``, ``thinking``; of a local model ``device``, ``dtype``, ``batch``, ``longest``; of a
    program ``timeout``. UserError for an unknown kind, and for a flag that this judge does not take.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest.strip():
        known = "; ".join(KINDS.values())
        hint = did_you_mean(kind, KINDS) if kind not in KINDS else "; nothing follows the colon"
        raise UserError(f"--judge {redacted(text)!r} is no judge{hint}; give one of: {known}")
    given = {key: value for key, value in options.items() if value is not None}
    made: Any
    if kind == "openai":
        from danceopd.bench.judges.endpoint import EndpointJudge as made

        match = re.fullmatch(r"(.*?)(?:@((?i:https?)://.+))?", rest.strip())
        if match is None or "://" in match[1]:
            raise UserError(f"--judge {redacted(text)!r} has no URL; write openai:MODEL@http://HOST:PORT/v1")
        rest = match[1]
        if match[2]:
            given["url"] = match[2]
    elif kind == "hf":
        from danceopd.bench.judges.local import LocalJudge as made
    elif kind == "cmd":
        from danceopd.bench.judges.program import ProgramJudge as made
    else:
        from danceopd.bench.judges.replay import ReplayJudge as made
    for key in given:
        if key not in inspect.signature(made).parameters:
            flag = FLAGS.get(key, f"--judge-{key.replace('_', '-')}")
            raise UserError(f"a judge of kind {kind}: takes no {flag}; leave it out")
    return made(rest.strip(), **given)
