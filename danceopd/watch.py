"""The watch: does the student fall in love with its own confident mistakes? It looks every so many steps, and says so.

At each check the panels draw their held-out prompts, and what the run believes is set against a judge that no training
uses (`panels`, `anchors`); limits decide what is an alarm (`watch_figures`). A check draws no random number and moves
no weight, so that a watched run is the run. What was seen stands in the run folder: `watch.jsonl` has a line for each
check, `watch.json` the whole so far; an alarm is also a line in the log, and figures in metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from danceopd.disk import disk_faults, replace_file
from danceopd.fields import VelocityField
from danceopd.panels import Panel
from danceopd.random_state import RandomState
from danceopd.recipe_watch import Watch as Knobs
from danceopd.watch_figures import Interval, Limits, Look, Seen, alarms, mistakes, spearman

LINES, SUMMARY = "watch.jsonl", "watch.json"
SHARE = "gate/ess"
"""The figure of an update that says how evenly its rows weighed."""
_log = logging.getLogger("danceopd")


class Watch:
    """What the panels showed so far. `folder` None writes and says nothing: another process does.

    `judge` says who judges, `lines` what was seen before (`recall`). Alarms of the last check are `ringing`.
    """

    def __init__(
        self,
        knobs: Knobs,
        panels: Sequence[Panel],
        judge: str,
        folder: Path | None = None,
        lines: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.knobs, self.panels, self.judge, self.folder = knobs, list(panels), judge, folder
        self.limits = Limits(**{field.name: getattr(knobs, field.name) for field in fields(Limits)})
        self.ringing: list[str] = []
        self.shares: list[float] = []  # of the updates since the last check
        self._lines = list(lines)
        random = RandomState.now()
        for panel in self.panels:
            panel.begin()
            if self._lines:
                panel.usual = self._lines[0]["usual"].get(panel.name, panel.usual)
        random.restore()

    @property
    def begun(self) -> bool:
        """Whether there is a check to compare with."""
        return bool(self._lines)

    def hear(self, figures: dict[str, float]) -> None:
        """The figures of an update, of which the gates' effective share is kept."""
        if SHARE in figures:
            self.shares.append(figures[SHARE])

    def check(self, step: int, student: VelocityField) -> dict[str, float | str]:
        """Look at the student; what the log should say of it."""
        began, random = time.monotonic(), RandomState.now()
        looks = {panel.name: panel.look(student) for panel in self.panels}
        seen = _history(self._lines)
        for panel in self.panels:
            look, before = looks[panel.name], seen.setdefault(panel.name, [])
            if not before:
                panel.usual = min(panel.usual, look.spread)
            before.append(_seen(look, panel.usual))
        beliefs = _beliefs(list(looks.values()))
        share = sum(self.shares) / len(self.shares) if self.shares else None
        self.shares = []
        self.ringing = alarms(self.limits, beliefs, seen, share)
        random.restore()
        for sentence in self.ringing if self.folder else ():
            _log.warning("watch, step %d: %s", step, sentence)
        line = {
            "step": step,
            "beliefs": {name: {"mistakes": asdict(a), "spearman": asdict(b)} for name, (a, b) in beliefs.items()},
            "panels": {panel.name: asdict(seen[panel.name][-1]) for panel in self.panels},
            "usual": {panel.name: panel.usual for panel in self.panels},
            "effective": share,
            "alarms": self.ringing,
            "seconds": round(time.monotonic() - began, 3),
        }
        self._write(line)
        return self._figures(line)

    def roll(self, step: int, back: int) -> None:
        """Note that the state after `back` was brought back because of the alarms of `step`."""
        if self.folder:
            then = "goes on without gates" if self.knobs.rollback == "plain" else "ends there"
            _log.warning("watch, step %d: the state after step %d is brought back, and the run %s", step, back, then)
        self._write({"step": step, "rolled_back_to": back, "then": self.knobs.rollback, "why": self.ringing})

    def sentences(self) -> list[str]:
        """What the model card says: who judged, how often, and every alarm."""
        checks = [line for line in self._lines if "panels" in line]
        said = [f"Watched at {len(checks)} steps, judged by {self.judge}; no training used that judge."]
        for line in self._lines:
            if "rolled_back_to" in line:
                said.append(f"After step {line['step']} the state of step {line['rolled_back_to']} was brought back.")
            else:
                said += [f"Step {line['step']}: {sentence}." for sentence in line["alarms"]]
        return said if any(line.get("alarms") for line in checks) else [*said, "No alarm rang."]

    def _figures(self, line: Mapping[str, Any]) -> dict[str, float | str]:
        """Flat names for metrics.jsonl and TensorBoard."""
        found: dict[str, float | str] = {"watch/alarms": float(len(self.ringing))}
        for name, figures in line["beliefs"].items():
            found[f"watch/mistakes of {name}"] = figures["mistakes"]["value"]
            found[f"watch/rank correlation of {name}"] = figures["spearman"]["value"]
        for name, seen in line["panels"].items():
            found |= {f"watch/{what} {name}": seen[what] for what in ("score", "strength", "diversity")}
        if line["effective"] is not None:
            found["watch/effective"] = line["effective"]
        if self.ringing:
            found["watch/alarm"] = "; ".join(self.ringing)
        return found

    # -- files ----------------------------------------------------------------------------------------

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self.folder is None:
            return
        with disk_faults(self.folder / LINES):
            with open(self.folder / LINES, "a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(line)) + "\n")
            replace_file(self.folder / SUMMARY, json.dumps(_plain(self.summary()), indent=1).encode())

    def summary(self) -> dict[str, Any]:
        """All that was seen, without the prompts' own scores."""
        checks = [line for line in self._lines if "panels" in line]
        short = [
            {**line, "panels": {n: {k: v for k, v in p.items() if k != "scores"} for n, p in line["panels"].items()}}
            for line in checks
        ]
        return {
            "judge": self.judge,
            "prompts": {panel.name: panel.prompts for panel in self.panels},
            "seeds": self.knobs.seeds,
            "limits": asdict(self.limits),
            "checks": short,
            "alarms": [{"step": line["step"], "sentence": s} for line in checks for s in line["alarms"]],
            "rolled_back": [line for line in self._lines if "rolled_back_to" in line],
        }


def recall(folder: Path, step: int, rolled: bool) -> list[dict[str, Any]]:
    """The lines of `watch.jsonl` up to `step`; what was written after it is dropped, and will be seen anew.

    `rolled`: an alarm brought this state back (`Watch.roll`), and what was seen before that is kept.
    """
    path = folder / LINES
    if not path.is_file():
        return []
    lines = list(_readable(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    backs = [i for i, line in enumerate(lines) if "rolled_back_to" in line] if rolled else []
    kept = backs[-1] + 1 if backs else 0
    found = lines[:kept] + [line for line in lines[kept:] if line["step"] <= step and "panels" in line]
    with disk_faults(path):
        replace_file(path, "".join(json.dumps(_plain(line)) + "\n" for line in found).encode())
    return found


def _history(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Seen]]:
    """What the checks saw, by panel; those that a roll-back undid are gone."""
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        if "rolled_back_to" in line:
            kept = [one for one in kept if one["step"] <= line["rolled_back_to"]]
        else:
            kept.append(line)
    found: dict[str, list[Seen]] = {}
    for line in kept:
        for name, seen in line["panels"].items():
            found.setdefault(name, []).append(Seen(**seen))
    return found


def _seen(look: Look, usual: float) -> Seen:
    confidence = {name: float(values.mean()) for name, values in look.beliefs.items()}
    ratio = look.spread / usual if usual > 0 else 1.0
    return Seen(float(look.score.mean()), confidence, look.strength, ratio, look.score.mean(1).tolist())


def _beliefs(looks: Sequence[Look]) -> dict[str, tuple[Interval, Interval]]:
    """Of each belief, over the panels that have it, the rate of confident mistakes and the rank correlation."""
    found = {}
    for name in dict.fromkeys(name for look in looks for name in look.beliefs):
        pairs = [(look.beliefs[name], look.score) for look in looks if name in look.beliefs]
        if all(math.isfinite(float(part.sum())) for pair in pairs for part in pair):
            found[name] = mistakes(pairs), spearman(pairs)
    return found


def _readable(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Lines that are whole; a process may have been killed in the middle of the last."""
    for line in lines:
        try:
            yield _numbers(json.loads(line))
        except ValueError:
            continue


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinities by their names."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """`_plain` undone."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
