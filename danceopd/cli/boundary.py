"""The end of every command: whatever was raised becomes one sentence and an exit status (docs/exit-statuses.md).

0: done. 1: a fault of danceopd, whose traceback is in a file that the sentence names. 2: what a user can mend: input,
flags, memory, a disk, a judge that gave no score. 128 + N: signal N ended it (129 SIGHUP, 130 Ctrl-C, 141 a closed
pipe, 143 SIGTERM).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from danceopd.common.signals import Stopped, end_on_signals
from danceopd.common.system import OUT_OF_MEMORY
from danceopd.errors import UserError

CONTINUED = ("audit", "merge", "bench", "compare", "teach")
"""Commands that, run again, go on where they were stopped."""
LONGEST = 400
"""Characters of a sentence, at most."""
LOWER = {
    "merge": "lower micro_batch or batch, student.rank, call.height and call.width (danceopd plan says what a recipe "
    "takes, and which changes make it fit)",
    "bench": "lower --batch, or give --device cpu",
    "sample": "give a smaller --height and --width, or --device cpu",
    "extract": "lower --rank, or give --device cpu",
    "blend": "blend fewer LoRAs, or lower their ranks with danceopd export --rank",
    "export": "lower --rank",
}
"""What to lower where memory does not suffice, by command."""
_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO,
    errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.ESTALE, errno.EBUSY,
)  # fmt: skip
"""Errors of the operating system that the machine's owner mends."""
_ASKED = re.compile(r"tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ [KMGT]iB)|allocate ([\d.]+ \w+) for")
_UNPRINTED = "what this prints cannot be written ({}); free some space, or print elsewhere"
_PIPE = 128 + int(getattr(signal, "SIGPIPE", 13))
_folder: Path | None = None


def traceback_in(folder: str | Path) -> None:
    """Where the traceback of a fault is written if this folder exists then: the output of the command at hand."""
    global _folder
    _folder = Path(folder)


class Commands(TyperGroup):
    """A group of commands, run as a program: exceptions become sentences, and it ends with an exit status."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        how = {"windows_expand_args": windows_expand_args, **extra}
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **how)
        status = 1
        try:
            _check_surroundings()
            status = super().main(args, prog_name, complete_var, False, **how) or 0
            if status == 128 + signal.SIGINT:  # typer's answer to a Ctrl-C before there is a command: without a word
                status = explained(KeyboardInterrupt(), "")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.__context__, BrokenPipeError):  # rich and typer say 1
                status = _PIPE
        except BaseException as error:
            status = explained(error, "")
        sys.exit(flushed(status))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception, Stopped) as error:
            if hasattr(error, "exit_code"):  # typer's own
                raise
            raise SystemExit(explained(error, ctx.invoked_subcommand or "")) from None


def explained(error: BaseException, command: str) -> int:
    """Print the one sentence of what ended a command, and return its exit status."""
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "number", None)
    if isinstance(error, KeyboardInterrupt | Stopped):
        assert number is not None
        end_on_signals(128 + number)
        again = "; run the same command again to continue" if command in CONTINUED else ""
        _print(f"\nstopped{again}")
        return 128 + number
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return _PIPE
    if hasattr(error, "format_message"):  # typer's own: a wrong flag, or no argument at all
        if type(error).__name__ == "NoArgsIsHelpError":
            _print(error.format_message())
        else:
            say(f"{_stripped(error.format_message())}; run {_usage(error)} --help to see what it takes")
        return int(getattr(error, "exit_code", 2))
    known = _known(error, command)
    say(known or _fault(error))
    return 2 if known else 1


def sentence(error: Exception, command: str) -> str:
    """The one sentence of what went wrong; the traceback of a fault of our own is in a file that it names."""
    return _known(error, command) or _fault(error)


def _known(error: BaseException, command: str) -> str:
    """The sentence of what a user can mend; empty for a fault of our own."""
    from danceopd.common.files import is_disk_full

    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or OUT_OF_MEMORY.search(text):
        asked = _ASKED.search(text)
        size = "" if asked is None else f" ({_size(asked)} more were needed)"
        device = "the GPU's memory" if "CUDA" in text else "memory"
        return f"{device} does not suffice for this{size}; {LOWER.get(command, 'use a machine with more')}"
    if type(error).__module__.startswith("jinja2"):  # what a text encoder's prompts are written with
        return f"the chat template of the base's tokenizer fails ({shortened(text, 160)}); fetch the base model again"
    if not isinstance(error, OSError):
        return ""
    where = error.filename if isinstance(error.filename, str) else ""
    if is_disk_full(error):
        return f"the disk is full at {where or Path.cwd()}; free some space and run this again"
    if error.errno in _PLACE:
        return f"{where or 'a file'} cannot be used: {error.strerror}; check the path and what you may do there"
    return ""


def _size(asked: re.Match[str]) -> str:
    number, *words = asked.groups()
    return next(filter(None, words), None) or f"{int(number) / 1e9:.3g} GB"


def _fault(error: BaseException) -> str:
    """The sentence of a fault of our own, whose traceback is written to a file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}danceopd{os.sep}" in f.filename]
    place = "danceopd"
    if frames:
        parts = Path(frames[-1].filename).with_suffix("").parts
        last = len(parts) - 1 - parts[::-1].index("danceopd")
        place = ".".join((*parts[last:], frames[-1].name))
    what = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    file = _written("".join(traceback.format_exception(error)))
    there = f"the traceback is in {file}: report it with that file" if file else (
        "no folder could be written for its traceback; set TMPDIR to one that can and run it again"
    )  # fmt: skip
    return f"danceopd failed in {place} ({shortened(what, 160)}); {there}"


def _written(text: str) -> Path | None:
    """A new file with the text, in the first folder that takes one: the command's output, the temporary, this one."""
    folders: list[Callable[[], str | Path | None]] = [lambda: _folder, tempfile.gettempdir, Path.cwd, Path.home]
    for folder in folders:
        file = None
        try:
            if (place := folder()) is None or not os.path.isdir(place):
                continue
            file = Path(place) / f"danceopd-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            with open(file, "x", encoding="utf-8", errors="backslashreplace") as log:
                log.write(f"{sys.version}\n{sys.platform}\n{text}")
            return file
        except (OSError, RuntimeError):
            with suppress(OSError):
                if file is not None:
                    file.unlink()
    return None


def echo(text: object) -> None:
    """Print a line on standard output, without what would move a terminal's cursor."""
    from danceopd.common.console import printable

    try:
        print(printable(str(text)), flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise UserError(_UNPRINTED.format(error.strerror)) from None


def say(sentence: str) -> None:
    """Print an error as one line on stderr, without what would move a terminal's cursor."""
    _print(f"error: {shortened(' '.join(sentence.split()), LONGEST)}")


def shortened(text: str, most: int) -> str:
    """`text` in at most so many characters: long words lose their middle first, then the whole does."""
    if len(text) > most:
        text = re.sub(r"\S{100,}", lambda word: f"{word[0][:60]}…{word[0][-30:]}", text)
    if len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 3].rstrip()} … {text[-end:].lstrip()}"
    return text


def _print(text: str) -> None:
    from danceopd.common.console import printable

    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()


def _usage(error: Any) -> str:
    """The command that a wrong flag was given to."""
    return getattr(getattr(error, "ctx", None), "command_path", None) or "danceopd"


def _stripped(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _check_surroundings() -> None:
    """UserError where no command could work."""
    try:
        Path.cwd()
    except OSError:
        raise UserError("the folder that this was started in no longer exists; change to another one") from None
    if sys.flags.optimize > 1:
        raise UserError("Python runs without docstrings (-OO), which transformers needs; unset PYTHONOPTIMIZE")


def flushed(status: int) -> int:
    """Write out what is printed; the exit status, which is another where that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError):  # or Python tries again as it ends, and says so
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if status == 0:
                closed = getattr(error, "errno", None) == errno.EPIPE
                status = _PIPE if closed else 2
                if not closed:
                    say(_UNPRINTED.format(error))
    return status


def prepare() -> None:
    """Make a process ready to be the program: streams that are there, and warnings and threads that say one line."""
    for number in range(3):  # a closed one would be taken by the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    logging.getLogger("danceopd").addHandler(_Warnings(logging.WARNING))
    threading.excepthook = _say_thread


class _Warnings(logging.Handler):
    """One line each, on what standard error is at that time: a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


def _say_thread(failed: threading.ExceptHookArgs) -> None:
    """One line of what ended a thread; TensorBoard's own failure is raised again where it is next written to."""
    if not isinstance(failed.exc_value, OSError):
        logging.getLogger("danceopd").warning("a thread failed (%s: %s)", failed.exc_type.__name__, failed.exc_value)
