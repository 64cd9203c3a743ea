"""What a checkpoint of a run holds, put in and put back together: the loop, the gap's course, every random state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danceopd.gap_course import Course
from danceopd.loop import Loop
from danceopd.processes import Processes
from danceopd.random_state import RandomState
from danceopd.run import RunFolder

ROLLED = "rolled back"
"""Key of a checkpoint's facts: an alarm of the watch brought its state back, and its gates are off."""


class Saving:
    """Checkpoints of one run, of all its processes. `run` is the first one's alone; `facts` stand in each of them."""

    def __init__(
        self, run: RunFolder | None, loop: Loop, course: Course, processes: Processes, facts: Mapping[str, Any]
    ) -> None:
        self.run, self.loop, self.course, self.processes, self._facts = run, loop, course, processes, dict(facts)

    def save(self, facts: Mapping[str, Any], good: bool = False) -> None:
        """Write one with more `facts`; a `good` one stands apart (`RunFolder.save`)."""
        states, learnt = self.processes.all(RandomState.now()), self.loop.state()
        if self.run is not None:
            tensors = {**learnt, **self.course.state()}
            told = {**self._facts, **self.course.facts, **facts}
            self.run.save(self.loop.step, tensors, told, states, good)

    def restore(self, good: bool = False) -> dict[str, Any] | None:
        """Bring back the newest whole one, or the last good one and switch gates off; its facts, if it is there."""
        saved = None if self.run is None else self.run.good() if good else self.run.load()
        found = (None, [], {}) if saved is None else (saved.step, saved.random, saved.meta)
        step, random, facts = self.processes.said(found)
        if step is None:
            return None
        if good or ROLLED in facts:
            self.loop.ungate()
        tensors = self.processes.shared(None if saved is None else saved.tensors)
        self.loop.restore(step, tensors)
        self.course.restore(facts, tensors)
        if self.processes.rank < len(random):
            random[self.processes.rank].restore()
        return facts
