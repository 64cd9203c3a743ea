"""Text that others wrote goes in, plain data comes out: files, YAML and JSON with bounds that hold before it is used.

Only regular files are opened (a pipe would wait for ever, a device has no end). A file has at most so many bytes, data
at most `MAX_DEPTH` levels, a number at most `MAX_DIGITS` digits, and every string can be written as UTF-8. YAML is read
as JSON's types: no tags, no dates, and all that its aliases stand for counts.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from danceopd.errors import UserError

MAX_DEPTH, MAX_NODES, MAX_DIGITS = 64, 20_000, 40
YAML_BYTES, JSON_BYTES = 1 << 18, 1 << 26
"""The largest recipe and the largest configuration that are read."""
_KINDS = {
    stat.S_ISFIFO: "a named pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket"
}  # fmt: skip


def local_path(value: str | os.PathLike[str], what: str) -> Path:
    """A path that a user gave, `~` resolved; `what` is how messages name it. It need not exist.

    UserError for one that no file can have, that is not text, or that is a pipe or a device.
    """
    text = os.fspath(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {what} {text!r} is not text in UTF-8; rename it") from None
    if "\0" in text:
        raise UserError(f"{what} {text!r} contains the character NUL, which no path can have; mend the path")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"the home folder that {text.split('/')[0]} stands for in {what} {text!r} is not known; "
                        "write the whole path") from None  # fmt: skip
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        raise UserError(f"{what} {path} cannot be used: {error.strerror}; check the path") from None
    for is_kind, name in _KINDS.items():
        if is_kind(mode):
            raise UserError(f"{what} {path} is {name}; give a file or a folder")
    return path


def read_text(path: Path, what: str, most: int = JSON_BYTES) -> str:
    """The text of a file in UTF-8; UserError that names it with `what` where it cannot be read, or has over `most`
    bytes."""
    path = local_path(path, what)
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        link = f" (it is a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise UserError(f"{what} {path} does not exist{link}; check the path (now in {Path.cwd()})") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder; name the file in it") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}; check the path") from None
    if len(content) > most:
        raise UserError(f"{what} {path} has more than {most:,} bytes, which none needs; name the right file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not text in UTF-8; save it as UTF-8") from None


def parse_json(text: str | bytes, constant: Callable[[str], float] = float) -> Any:
    """The data in a JSON text; ValueError for one that is no JSON, or too deep, or whose strings are no text.

    `constant` makes a number of NaN, Infinity and -Infinity, which Python writes.
    """
    text = text if isinstance(text, str) else text.decode()
    try:
        data = json.loads(text, parse_int=_integer if _LONG.search(text) else None, parse_constant=constant)
    except RecursionError:
        raise ValueError(_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _too_deep(data):
        raise ValueError(_DEEP)
    if "\\u" in text:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a character (a lone surrogate)") from None
    return data


def read_json(path: Path, what: str, kind: type = dict, mend: str = "restore it") -> Any:
    """The JSON data in a file, of a `kind` (dict or list); UserError that names the file otherwise."""
    text = read_text(path, what)
    try:
        data = parse_json(text, _number)
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); {mend}") from None
    if not isinstance(data, kind):
        raise UserError(f"{what} {path} is JSON and not {'a list' if kind is list else 'an object'}; {mend}")
    return data


def parse_yaml(text: str) -> Any:
    """The data in a YAML text; yaml.MarkedYAMLError with the place for all that is wrong with it."""
    return yaml.load(text, Loader=_Bounded)  # a SafeLoader


_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _number(constant: str) -> float:
    if constant == "NaN":
        raise ValueError("it holds NaN, which is no number")
    return float(constant)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _too_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True


class _Bounded(yaml.SafeLoader):
    """A SafeLoader of JSON's types that refuses a key written twice, tags, and what is too large or deep."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of finished nodes, by id

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        before, self._depth = self._nodes, self._depth + 1
        if getattr(event, "tag", None) not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _fault(f"the tag {tag} is not read here; write the plain value, words in quotes", event)
        if self._depth > MAX_DEPTH:
            raise _fault(_DEEP, event)
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        elif id(node) in self._sizes:
            self._nodes += self._sizes[id(node)]
        else:
            raise _fault(f"the alias *{event.anchor} stands for what it is in", event)
        if self._nodes > MAX_NODES:
            raise _fault(f"it holds more than {MAX_NODES:,} values", event)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _fault(f"the key {key.value!r} is there twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        is_number = node.tag.rpartition(":")[2] in ("int", "float")
        if is_number and len(node.value) > MAX_DIGITS:
            raise _fault(f"a number has {len(node.value):,} digits", node)
        if isinstance(node, yaml.ScalarNode) and re.search("[\0\ud800-\udfff]", node.value):
            raise _fault(f"{node.value!r} holds a character that no text has", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, IndexError):
            raise _fault(f"{node.value!r} is no number", node) from None


_Bounded.yaml_implicit_resolvers = {  # a date is a word
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _fault(problem: str, place: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)
