"""The judge of a `--judge` option."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench.judges.protocol import Judge
from danceopd.common.messages import did_you_mean
from danceopd.common.system import redacted
from danceopd.errors import UserError
from danceopd.plugins import KINDS as PLUGINS
from danceopd.plugins import MODULE_NAME, check_name, load, name_of, origin, plugin_names

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
PARTS = ("identity", "sees", "deterministic", "name", "check", "quote", "ask")
"""What every judge has (protocol.Judge)."""


def open_session(
    text: str | Judge, file: Path, arguments: Mapping[str, Any], repeats: int = 1, max_cost: float | None = None
) -> JudgeSession:
    """A session of the judge of `load_judge`, whose answers are in `file`; nothing is asked yet."""
    from danceopd.bench.judges.session import JudgeSession

    return JudgeSession(load_judge(text, **arguments), file, repeats, max_cost)


def load_judge(text: str | Judge, **options: Any) -> Judge:
    """The judge of "openai:MODEL@URL", "hf:FOLDER", "cmd:PROGRAM" or "replay:FILE", or a plug-in's.

    That is "NAME" or "NAME:TEXT": the NAME of an entry point, or module:name, and a TEXT that it is made of. A judge
    that is made already is looked at, and returned.

    ``options`` are arguments of the judge's class, None for what was not given: of an endpoint ``url``, ``key_file``,
    ``temperature``, ``codec`` ("png", "jpeg:75"), ``longest``, ``detail``, ``concurrency``, ``timeout``, ``tries``,
    ``price_in``, ``price_out``, ``thinking``; of a local model ``device``, ``dtype``, ``batch``, ``longest``; of a
    program ``timeout``. UserError for an unknown kind, and for a flag that this judge does not take.
    """
    given = {key: value for key, value in options.items() if value is not None}
    made: Any
    if not isinstance(text, str):
        made = text(**given) if isinstance(text, type) else text
        return _checked(made, type(made).__name__, name_of("judge", text))
    if name := _own_name(text):
        return _own_judge(name, text[len(name) + 1 :], given)
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest.strip():
        known = "; ".join(KINDS.values())
        hint = did_you_mean(kind, KINDS) if kind not in KINDS else "; nothing follows the colon"
        raise UserError(f"--judge {redacted(text)!r} is no judge{hint}; give one of: {known}")
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
            raise UserError(f"a judge of kind {kind}: takes no {_flag(key)}; leave it out")
    return made(rest.strip(), **given)


def _own_name(text: str) -> str | None:
    """The plug-in's name that a judge's text begins with; None for a kind that is built in, and for what is none."""
    kind = text.partition(":")[0]
    if kind in KINDS or kind in plugin_names("judge"):
        check_name("judge", kind, KINDS)
        return None if kind in KINDS else kind
    module = re.match(rf"{MODULE_NAME[:-1]}(?=:|$)", text)
    top = kind.partition(".")[0]
    there = module and (top in sys.modules or find_spec(top) or any(Path().glob(f"{top}*")))
    return module[0] if module and there else None


def _own_judge(name: str, text: str, options: dict[str, Any]) -> Judge:
    """The judge that a plug-in makes of a text and options."""
    function = load("judge", name)
    values = [text] if text else []
    try:
        inspect.signature(function).bind(*values, **options)
    except TypeError as error:
        flags = ", ".join([*(["the text after its name"] if text else []), *map(_flag, options)]) or "nothing"
        raise UserError(f"judge {name} is made of {flags}: {error}; give what its class takes") from None
    return _checked(function(*values, **options), name, name)


def _checked(judge: Any, words: str, name: str) -> Judge:
    """A judge of the user's, whose identity says which plug-in it is; UserError where it lacks a part."""
    lacks = [part for part in PARTS if not hasattr(judge, part)]
    if lacks:
        raise UserError(f"judge {words} has no {', '.join(lacks)}; it must be {PLUGINS['judge'].must}")
    try:
        json.dumps(judge.identity)
    except (TypeError, ValueError) as error:
        raise UserError(f"judge {words} has an identity that is no plain JSON ({error}); mend it") from None
    if not type(judge).__module__.startswith("danceopd."):
        with suppress(AttributeError):  # a property: it says itself what it is
            judge.identity = {**judge.identity, "plugin": f"{name}: {origin('judge', name)}"}
    return judge


def _flag(key: str) -> str:
    return FLAGS.get(key, f"--judge-{key.replace('_', '-')}")
