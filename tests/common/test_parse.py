"""Bounds on text that others wrote: what is refused, with which words, and that it takes no time."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from danceopd.common.messages import read_yaml
from danceopd.common.parse import local_path, parse_json, read_json, read_text
from danceopd.errors import UserError


def alias_bomb() -> str:
    text = "&a0 [x,x,x,x,x,x,x,x,x,x]"
    for i in range(1, 10):
        text = f"&a{i} [{text}," + ",".join([f"*a{i - 1}"] * 9) + "]"
    return f"steps: {text}"


YAML = {
    "a tag": ("steps: !!int abc", "line 1 .*the tag !!int is not read.*steps"),
    "code": ("steps: !!python/object/apply:os.system [ls]", "python/object/apply:os.system is not read"),
    "an alias bomb": (alias_bomb(), "more than 20,000 values in 'steps"),
    "an alias of itself": ("student: &a {rank: *a}", "alias \\*a stands for what it is in .*rank"),
    "digits": ("steps: " + "9" * 5000, "a number has 5,000 digits in 'steps"),
    "hexadecimal digits": ("steps: 0x" + "f" * 5000, "a number has 5,002 digits in 'steps"),
    "no number": ("steps: 0x_", "'0x_' is no number"),
    "depth": ("steps: " + "[" * 5000 + "]" * 5000, "nested more than 64 levels"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(400)), "nested more than 64 levels"),
    "half a character": ('base: "\\ud800"', "a character that no text has in 'base"),
    "NUL": ('base: "a\\0b"', "a character that no text has in 'base"),
    "a key twice": ("steps: 3\nsteps: 4", "line 2 .*'steps' is there twice"),
    "a list as a key": ("? [a, b]\n: 1", "line 1.*unhashable key"),
    "size": ("# " + "x" * (1 << 18), "more than 262,144 bytes"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(tmp_path: Path, name: str) -> None:
    text, words = YAML[name]
    (tmp_path / "r.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"recipe .*r.yaml.*{words}"):
        read_yaml(tmp_path / "r.yaml", "recipe")
    assert time.monotonic() - began < 2


def test_yaml_that_is_read(tmp_path: Path) -> None:
    """Dates are words, and small aliases and merged mappings are as always."""
    text = "a: &x [1, 2.5]\nb: *x\nc: 2001-01-01\nd: {<<: {e: yes}, f: null}\n"
    (tmp_path / "r.yaml").write_text(text)
    wanted = {"a": [1, 2.5], "b": [1, 2.5], "c": "2001-01-01", "d": {"e": True, "f": None}}
    assert read_yaml(tmp_path / "r.yaml", "recipe") == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100 + "]" * 100, "64 levels"),
        ("[" * 100_000, "64 levels"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": ' + "1" * 50 + "}", "50 digits"),
        ('{"a": ' + "1" * 5000 + "}", "5,000 digits"),
        ("{", "Expecting"),
        (b'{"a": "\xff"}', "utf-8"),
    ],
)
def test_json_that_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_that_is_read(tmp_path: Path) -> None:
    """Many lists side by side, digits in a word, a whole character of two halves; and a file must hold its kind."""
    assert parse_json('{"a": [' + ",".join(["[1]"] * 100) + "]}") == {"a": [[1]] * 100}
    assert parse_json('["' + "1" * 60 + '", "\\ud83c\\udfa8"]') == ["1" * 60, "🎨"]
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UserError, match="the index .*c.json is JSON and not an object; restore it"):
        read_json(tmp_path / "c.json", "the index")
    assert read_json(tmp_path / "c.json", "the index", list) == [1]


def test_only_files_are_opened(tmp_path: Path) -> None:
    """A pipe would wait for ever, a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    wrong = {"pipe": "is a named pipe", "gone": "is a link to nowhere", "loop": "Too many levels", ".": "is a folder"}
    for name, words in wrong.items():
        with pytest.raises(UserError, match=f"recipe .*{words}"):
            read_text(tmp_path / name, "recipe")
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read_text(Path("/dev/zero"), "recipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="is a socket"):
            local_path(tmp_path / "s", "recipe")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a\0b", "the character NUL"),
        ("x" * 5000, "File name too long"),
        ("./" + "x" * 300, "File name too long"),
        ("~nosuchuser/x", "home folder that ~nosuchuser stands for"),
        (os.fsdecode(b"a\xff"), "not text in UTF-8"),
    ],
)
def test_paths_that_no_file_can_have(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        local_path(path, "adapter")
