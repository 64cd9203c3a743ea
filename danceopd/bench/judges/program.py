"""A judge that is a program: one long-running process that reads and writes JSON lines.

So GenEval's detector, or anything else with its own dependencies, is used without sharing an environment. The program
is started once and reads one object a line: {"key", "aspect", "system", "parts": [{"text"} or {"picture": path}],
"reads", "facts", "max_tokens", "repeat"}. It answers each with one line: {"key", "numbers": [...]} or {"key",
"choice"} or {"key", "text": what a language model said} or {"key", "status": "refused"}, optionally with "reasoning";
"finish_reason": "length" for a text that was cut off; other lines are ignored. Images are PNG files that are deleted
after the answer. A crash or a timeout is a failed answer, and the program is restarted for the next question; after
three in a row, or one timeout of a program that has never answered, the rest fails without being asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from danceopd.bench.judges.parse import ParsedAnswer, read
from danceopd.bench.judges.protocol import Answer, Question, Quote
from danceopd.common.files import sha256
from danceopd.common.system import redacted
from danceopd.data.images import picture
from danceopd.errors import UserError

MAX_FAILURES = 3
"""Failed answers in a row after which the program is not started again."""
TIMEOUT, START = 300.0, 600.0
"""Seconds until an answer counts as lost, and further ones for the first, in which the program may load a model."""
MAX_LINE = 1 << 24
"""Bytes of a line of the program's output, of which longer ones are dropped."""


class ProgramJudge:
    """``command`` is split as by a shell. ``timeout`` in seconds; the first answer may take ``start`` seconds more, by
    default `START`, and nothing where a timeout is given."""

    sees = ("facts",)
    deterministic = False

    def __init__(self, command: str, *, timeout: float | None = None, start: float | None = None) -> None:
        try:
            self.command = shlex.split(command)
        except ValueError as error:
            raise UserError(
                f"judge cmd:{redacted(command)} cannot be split into words ({error}); correct its quotes"
            ) from None
        if not self.command:
            raise UserError("--judge cmd: names no program; write cmd:PROGRAM, such as cmd:'python score.py'")
        if timeout is not None and not 0 < timeout < threading.TIMEOUT_MAX:
            raise UserError(f"--judge-timeout is {timeout}; give seconds above zero")
        if start is not None and not 0 <= start < threading.TIMEOUT_MAX:
            raise UserError(f"--judge-start is {start}; give seconds, zero or more")
        self.timeout = TIMEOUT if timeout is None else timeout
        self.start = start if start is not None else START if timeout is None else 0.0
        self.check()
        files = [Path(word) for word in self.command if _is_file(word)]
        own = [file for file in files if file.suffix or len(self.command) == 1]  # not the interpreter
        words = "\n".join(Path(word).name if _is_file(word) else word for word in self.command)
        self.identity: dict[str, Any] = {
            "kind": "cmd",
            "command": redacted(words).split("\n"),
            "files": {file.name: sha256(file) for file in own},
        }
        if redacted(words) != words:  # two commands with different keys are still two
            self.identity["sha256"] = hashlib.sha256(words.encode()).hexdigest()

    @property
    def name(self) -> str:
        return next((Path(word).name for word in self.command[1:] if _is_file(word)), Path(self.command[0]).name)

    def check(self) -> None:
        """UserError where the program does not exist."""
        if shutil.which(self.command[0]) is None:
            name = redacted(self.command[0])
            raise UserError(f"the judge's program {name} is not found; give its path or install it")

    def quote(self, question: Question) -> Quote:
        return Quote()

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        failures, answered, why = 0, False, ""
        running: _Process | None = None
        try:
            for question in questions:
                if failures >= MAX_FAILURES:
                    lost = ParsedAnswer("failed")
                    yield lost.answer(question, f"not asked, for {why}", judge=self.name)
                    continue
                first = running is None
                if running is None:
                    running = _Process(self.command)
                answer = self._answer(running, question, self.timeout + (self.start if first else 0.0))
                if answer.status == "failed":
                    hopeless = running.late and not answered  # it would hang again, for as long
                    failures, why = MAX_FAILURES if hopeless else failures + 1, answer.text
                    running.stop()
                    running = None
                else:
                    failures, answered = 0, True
                yield answer
        finally:
            if running is not None:
                running.stop()

    def _answer(self, running: _Process, question: Question, seconds: float) -> Answer:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="danceopd-judge-") as folder:
            row = running.answer(_request(question, Path(folder)), question.key, seconds)
        if isinstance(row, str):
            got, text = ParsedAnswer("failed"), row
        else:
            got, text = _parsed(row, question), _text(row)
        seconds = round(time.monotonic() - began, 3)
        cut = isinstance(row, dict) and _is_cut(row)
        return got.answer(question, text, attempts=1, seconds=seconds, judge=self.name, cut=cut)


def _request(question: Question, folder: Path) -> dict[str, Any]:
    parts: list[dict[str, str]] = []
    for part in question.parts:
        if isinstance(part, str):
            parts.append({"text": part})
        else:
            file = folder / f"{len(parts)}.png"
            picture(part).save(file, compress_level=1)
            parts.append({"picture": str(file)})
    return {
        "key": question.key,
        "aspect": question.aspect,
        "system": question.system,
        "parts": parts,
        "reads": asdict(question.reads),
        "facts": dict(question.facts),
        "max_tokens": question.max_tokens,
        "repeat": question.repeat,
    }


def _parsed(row: dict[str, Any], question: Question) -> ParsedAnswer:
    """A program's line, parsed as strictly as a language model's answer."""
    if row.get("status") in ("refused", "failed"):
        return ParsedAnswer(row["status"], reasoning=str(row.get("reasoning", "")))
    return read(_text(row), question.reads, _is_cut(row))


def _is_cut(row: dict[str, Any]) -> bool:
    return row.get("finish_reason") == "length"


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # too long for a name, or with NUL in it
        return False


def _text(row: dict[str, Any]) -> str:
    text = row.get("text")
    return text if isinstance(text, str) else json.dumps(row, ensure_ascii=False)


class _Process:
    """The running program, with threads that read its output, so that nothing here can wait for ever."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its own children end with it
        )
        self.rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.key: str | None = None  # of the question that waits for its answer
        self.late = False  # whether an answer did not come in time
        self.errors: deque[str] = deque(maxlen=5)
        self.readers = [self._thread(self._read_rows), self._thread(self._read_errors)]

    def answer(self, request: dict[str, Any], key: str, seconds: float) -> dict[str, Any] | str:
        """The program's line for this key, or why there is none."""
        self.key, deadline = key, time.monotonic() + seconds
        self._thread(self._write, f"{json.dumps(request, ensure_ascii=False)}\n".encode())
        while True:
            try:
                row = self.rows.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.late = True
                return f"the program gave no answer in {seconds:g} s; --judge-timeout and --judge-start give it longer"
            if row is None:
                with suppress(subprocess.TimeoutExpired):  # it closed its output, but may still run
                    self.process.wait(timeout=1)
                self.readers[1].join(timeout=1)
                stderr = " ".join(self.errors)[-300:]
                status = self.process.poll()
                how = "closed its input or output" if status is None else f"ended with status {status}"
                return f"the program {how}{': ' if stderr else ''}{stderr}"
            if row.get("key") == key:
                return row

    def stop(self) -> None:
        """End the program and everything that it started."""
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0.2 if self.process.poll() is None else 0)
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()

    def _thread(self, work: Any, *args: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, daemon=True)
        thread.start()
        return thread

    def _write(self, line: bytes) -> None:
        try:
            stdin: IO[bytes] = self.process.stdin  # type: ignore[assignment]
            stdin.write(line)
            stdin.flush()
        except (OSError, ValueError):  # it has ended, or reads no more: no answer will come
            self.rows.put(None)

    def _read_rows(self) -> None:
        for line in _lines(self.process.stdout):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("key") == self.key:
                    self.rows.put(row)
        self.rows.put(None)

    def _read_errors(self) -> None:
        for line in _lines(self.process.stderr):
            self.errors.append(line[:1000].decode(errors="replace").strip())


def _lines(stream: IO[bytes] | None) -> Iterator[bytes]:
    """The lines of a stream that have at most `MAX_LINE` bytes, until it ends or is closed."""
    whole = True
    with suppress(OSError, ValueError):
        while stream is not None and (line := stream.readline(MAX_LINE)):
            ends = line.endswith(b"\n")
            if whole and (ends or len(line) < MAX_LINE):
                yield line
            whole = ends
