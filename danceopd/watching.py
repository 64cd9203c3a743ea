"""The watch at work in a run: when it looks, which state it keeps as good, and what an alarm brings back.

With `watch.rollback` the state of every check without an alarm is kept as a checkpoint of its own. The first alarm
brings the last of them back exactly (weights, average, optimizer, random states), drops what was saved and logged
after it, and the run goes on with every row counting 1 (plain), or ends there and exports that state (stop). It happens
once: a run that alarms without gates is not saved by going back again, and only says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from danceopd.fields import VelocityField
from danceopd.figures import Progress
from danceopd.loop import Loop
from danceopd.recipe import Recipe
from danceopd.run import RunFolder
from danceopd.saving import ROLLED, Saving
from danceopd.watch import Watch

SHARES = "shares"
"""Key of a checkpoint's facts: the updates' figures since the last check."""
_log = logging.getLogger("danceopd")


class Watching:
    """Ties a watch to a run. `watch` and `run` are None in processes that have none; `student` is what is looked at.

    `restored` is what the checkpoint said that the run goes on from.
    """

    def __init__(
        self,
        recipe: Recipe,
        loop: Loop,
        saving: Saving,
        watch: Watch | None,
        run: RunFolder | None,
        student: Callable[[], VelocityField],
        restored: Mapping[str, Any],
    ) -> None:
        self.knobs, self.steps, self.every = recipe.watch, recipe.steps, recipe.watch.steps(recipe.gates.on)
        self.loop, self.saving, self.watch, self.run = loop, saving, watch, run
        self.student, self.rolled = student, ROLLED in restored
        if watch is not None:
            watch.shares = list(restored.get(SHARES, []))
        if watch is not None and not watch.begun:
            marks = watch.check(loop.step, student())
            if run is not None:
                run.log(loop.step, **marks)
        if self.every and self._rolls:  # whatever it looks like, there is no better state yet
            self.saving.save(self.facts, good=True)

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the watch now."""
        shares = [] if self.watch is None else self.watch.shares
        return {**({ROLLED: True} if self.rolled else {}), **({SHARES: list(shares)} if shares else {})}

    @property
    def ended(self) -> bool:
        """Whether an alarm ended the run."""
        return self.rolled and self.knobs.rollback == "stop"

    def look(self, done: Progress) -> dict[str, float | str]:
        """Look if it is time to; the figures for the log, where there are any."""
        if self.watch is None:
            return {}
        self.watch.hear(done.scalars())
        return self.watch.check(done.step, self.student()) if self._due(done.step) else {}

    def settle(self, step: int) -> bool:
        """After a look: keep a good state, or bring the last one back, of which it says True."""
        if not self._due(step) or not self._rolls:
            return False
        if not self.saving.processes.said(self.watch is not None and bool(self.watch.ringing)):
            self.saving.save(self.facts, good=True)
            return False
        if self.saving.restore(good=True) is None:
            if self.run is not None:
                _log.warning("watch, step %d: there is no good state to bring back", step)
            return False
        back, self.rolled = self.loop.step, True
        if self.watch is not None:
            self.watch.roll(step, back)
        self.saving.save(self.facts)
        if self.run is not None:
            self.run.forget(back)
            self.run.log(back, **{"watch/rolled back from": float(step)})
        return True

    @property
    def _rolls(self) -> bool:
        return self.knobs.rollback is not None and not self.rolled

    def _due(self, step: int) -> bool:
        return self.every > 0 and (step == self.steps or step % self.every == 0)
