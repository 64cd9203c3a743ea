"""A judge that is a program: one long-running process that reads and writes JSON lines.

So GenEval's detector, or anything else with its own dependencies, is used without sharing an environment. The program
is started once and reads one object a line: {"key", "aspect", "system", "parts": [{"text"} or {"picture": path}],
"reads", "facts", "max_tokens", "repeat"}. It answers each with one line: {"key", "numbers": [...]} or {"key",
"choice"} or {"key", "text": what a language model said} or {"key", "status": "refused"}, optionally with "reasoning";
other lines are ignored. Images are PNG files that are deleted after the answer. A crash or a timeout is a failed
answer, and the program is restarted for the next question; after three in a row the rest fails without being asked.
"""

from __future__ import annotations

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
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from danceopd.bench.judges.parse import ParsedAnswer, read
from danceopd.bench.judges.protocol import Answer, Question, Quote
from danceopd.common.files import sha256
from danceopd.data.images import picture
from danceopd.errors import UserError

MAX_FAILURES = 3
"""Failed answers in a row after which the program is not started again."""


class ProgramJudge:
    """``command`` is split as by a shell. ``timeout`` in seconds; the first answer may take ``start`` seconds more."""

    sees = ("facts",)
    deterministic = False

    def __init__(self, command: str, *, timeout: float = 300.0, start: float = 600.0) -> None:
        try:
            self.command = shlex.split(command)
        except ValueError as error:
            raise UserError(f"judge cmd:{command} cannot be split into words ({error}); correct its quotes") from None
        if not self.command:
            raise UserError("--judge cmd: names no program; write cmd:PROGRAM, such as cmd:'python score.py'")
        if not timeout > 0:
            raise UserError(f"--judge-timeout is {timeout}; give seconds above zero")
        self.timeout, self.start = timeout, start
        self.check()
        files = [Path(word) for word in self.command if Path(word).is_file()]
        own = [file for file in files if file.suffix or len(self.command) == 1]  # not the interpreter
        self.identity: dict[str, Any] = {
            "kind": "cmd",
            "command": [Path(word).name if Path(word).is_file() else word for word in self.command],
            "files": {file.name: sha256(file) for file in own},
        }

    @property
    def name(self) -> str:
        return next((Path(word).name for word in self.command[1:] if Path(word).is_file()), Path(self.command[0]).name)

    def check(self) -> None:
        """UserError where the program does not exist."""
        if shutil.which(self.command[0]) is None:
            raise UserError(f"the judge's program {self.command[0]} is not found; give its path or install it")

    def quote(self, question: Question) -> Quote:
        return Quote()

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        failures = 0
        running: _Process | None = None
        try:
            for question in questions:
                if failures >= MAX_FAILURES:
                    why = f"not asked: the program failed {failures} times in a row"
                    yield Answer(question.key, "failed", text=why, judge=self.name, repeat=question.repeat)
                    continue
                first = running is None
                if running is None:
                    running = _Process(self.command)
                answer = self._answer(running, question, self.timeout + (self.start if first else 0.0))
                if answer.status == "failed":
                    failures += 1
                    running.stop()
                    running = None
                else:
                    failures = 0
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
        return got.answer(question, text, attempts=1, seconds=seconds, judge=self.name)


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
    return read(_text(row), question.reads)


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
        self.errors: deque[str] = deque(maxlen=5)
        self.readers = [self._thread(self._read_rows), self._thread(self._read_errors)]

    def answer(self, request: dict[str, Any], key: str, seconds: float) -> dict[str, Any] | str:
        """The program's line for this key, or why there is none."""
        deadline = time.monotonic() + seconds
        self._thread(self._write, f"{json.dumps(request, ensure_ascii=False)}\n".encode())
        while True:
            try:
                row = self.rows.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return f"the program gave no answer in {seconds:g} s"
            if row is None:
                with suppress(subprocess.TimeoutExpired):  # it closed its output, but may still run
                    self.process.wait(timeout=1)
                self.readers[1].join(timeout=1)
                stderr = " ".join(self.errors)[-300:]
                return f"the program ended with status {self.process.returncode}{': ' if stderr else ''}{stderr}"
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
        with suppress(OSError, ValueError):  # it has ended, which the reading thread notices
            stdin: IO[bytes] = self.process.stdin  # type: ignore[assignment]
            stdin.write(line)
            stdin.flush()

    def _read_rows(self) -> None:
        with suppress(OSError, ValueError):
            for line in self.process.stdout or ():
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        self.rows.put(row)
        self.rows.put(None)

    def _read_errors(self) -> None:
        with suppress(OSError, ValueError):
            for line in self.process.stderr or ():
                self.errors.append(line.decode(errors="replace").strip())
