"""`Interrupts`: catch SIGTERM and Ctrl-C during training, so that the current step ends and is saved first.

A second Ctrl-C, a second or more after the first, stops at once (launchers repeat the first within moments).
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which `caught` is the number of the signal that came, 0 for none; outside, signals act as before."""

    def __init__(self) -> None:
        self.caught, self._when = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught, self._when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when >= 1:
            raise KeyboardInterrupt
