"""Signals that end a command: SIGTERM, Ctrl-C, and SIGHUP of a terminal that is closed.

`raise_on_signals` turns them into exceptions, so that whatever is open is closed and nothing half-written stays.
`Interrupts` catches them during training, so that the current step ends and is saved first. What a shell started with
a signal ignored (nohup, a background job) goes on ignoring it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
GRACE = 10.0
"""Seconds after a signal in which a command may close what it has open."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP came, `number`; Ctrl-C is a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def raise_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise `Stopped` and SIGINT KeyboardInterrupt.

    A process that is still there `GRACE` seconds later, since a library swallowed that or waits for a thread, ends.
    """
    _handle(_raise)


def end_on_signals(status: int) -> None:
    """A signal that would raise an exception ends the process at once with `status`: nothing is left to be closed."""
    _handle(lambda number, frame: os._exit(status), lambda before: before is _raise)


def _handle(
    handler: Callable[[int, FrameType | None], None],
    wanted: Callable[[Any], bool] = lambda before: before is not signal.SIG_IGN,
) -> dict[int, Any]:
    """Set a handler for each of `ENDING` whose handler is `wanted` to be replaced; what was there before."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        return {}
    heard = [number for number in ENDING if wanted(signal.getsignal(number))]
    return {number: signal.signal(number, handler) for number in heard}


def _raise(number: int, frame: FrameType | None) -> None:
    last = threading.Timer(GRACE, os._exit, [128 + number])
    last.daemon = True
    last.start()
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


class Interrupts:
    """A context in which `caught` is the number of the signal that came, 0 for none; outside, signals act as before.

    A second Ctrl-C, a second or more after the first, stops at once (launchers repeat the first within moments).
    """

    def __init__(self) -> None:
        self.caught, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = _handle(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Raise what the signal would have raised outside, where one was caught."""
        if self.caught:
            raise KeyboardInterrupt if self.caught == signal.SIGINT else Stopped(self.caught)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught, self._when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when >= 1:
            raise KeyboardInterrupt
