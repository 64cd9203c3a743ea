"""What an endpoint is called and what it answers: its address without the keys in it, its replies whatever they hold.

A URL or a reply's text goes in, plain values come out. A reply is not trusted to have any of the protocol's fields:
what is not there, or of another kind, is empty or 0.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from danceopd.common.system import PUBLIC_QUERY, redacted
from danceopd.errors import UserError

MAX_TOKENS = 1 << 40
"""More tokens than an answer can have."""


@dataclass(frozen=True)
class Address:
    """Where an endpoint is. ``client`` may hold a user and a key; ``shown`` is the same for people and files.

    ``query``: what follows `?`, sent with every request. ``secrets``: the texts that must appear nowhere.
    """

    client: str
    shown: str
    host: str  # and port and path
    name: str  # of the host
    query: dict[str, str]
    secrets: tuple[str, ...]

    @classmethod
    def parse(cls, url: str) -> Address:
        """The address of a URL; UserError for one that is none."""
        try:
            parts = urlsplit(url.rstrip("/"))
            name, port, query = parts.hostname, parts.port, dict(parse_qsl(parts.query, keep_blank_values=True))
        except ValueError:
            name = None
        if not name or parts.scheme not in ("http", "https") or port == 0:
            raise UserError(f"the judge's URL {redacted(url)} names no host and port; write http://HOST:PORT/v1")
        user, place = parts.netloc.rpartition("@")[::2]
        path = parts.path.rstrip("/")
        hidden = [user, *user.split(":", 1)[-1:], *(v for k, v in query.items() if k.lower() not in PUBLIC_QUERY)]
        secrets = {text for one in hidden for text in (one, unquote(one))}
        client = f"{parts.scheme}://{parts.netloc}{path}"
        shown = f"{parts.scheme}://{place}{path}"
        return cls(client, shown, place + path, name, query, tuple(sorted(secrets, key=len, reverse=True)))


@dataclass(frozen=True)
class Reply:
    """One reply with an answer in it, or with something where an answer should be."""

    text: str = ""
    finish: str = ""
    refusal: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def cut(self) -> bool:
        """Whether the answer was stopped before its end."""
        return self.finish in ("length", "max_tokens")


def read_reply(body: str) -> Reply | str:
    """The reply in an endpoint's text; or why it is none, so that asking again may help."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return f"an answer that is not JSON: {_short(body)}"
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices:
        return f"an answer without choices: {_short(data.get('error') or body if isinstance(data, dict) else body)}"
    choice = _mapping(choices[0])
    message, usage = _mapping(choice.get("message")), _mapping(data.get("usage"))
    parts = message.get("content")
    parts = parts if isinstance(parts, list) else [parts]
    said = [part if isinstance(part, str) else _text(_mapping(part), "text") for part in parts]
    refused = [_text(message, "refusal"), *(_text(_mapping(part), "refusal") for part in parts)]
    return Reply(
        "".join(said),
        _text(choice, "finish_reason"),
        "".join(refused),
        _text(data, "model"),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(held: dict[str, Any], name: str) -> str:
    value = held.get(name)
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    """A count of tokens, 0 where it is no possible one."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if known and 0 <= value < MAX_TOKENS else 0


def _short(value: Any) -> str:
    return " ".join(str(value)[:400].split())[:200]
