"""The monitor: does the student grow confident in its own mistakes? A callback that checks every so many steps.

At each check the student draws the probes' held-out prompts, and confidences in those pictures are compared with a
judge that no training uses (probes.py, scorers.py); limits decide what is an alarm (statistics.py). A check draws no
random number and moves no weight, so a monitored run computes what it would have computed. `monitor.jsonl` has a line
for each check, `monitor.json` the whole so far; an alarm is also a line in the log, and figures in metrics.jsonl. With
`monitor.rollback` the state of every check without an alarm is kept, and the first alarm brings the last of them back.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, json_safe, write_atomic, write_json
from danceopd.common.rng import RandomState
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer
from danceopd.labelfree.probes import ProbeSet
from danceopd.labelfree.statistics import Check, Interval, Limits, Measurement, alarms, mistakes, spearman
from danceopd.models.fields import ContrastField, VelocityField
from danceopd.recipe.labelfree import Monitor as Options
from danceopd.run.checkpoints import Checkpoints
from danceopd.run.directory import RunDirectory

LINES, SUMMARY = "monitor.jsonl", "monitor.json"
OLD_KEYS = {"beliefs": "confidences", "panels": "probes"}
"""Keys of the lines of older runs, and what they are called now."""
EFFECTIVE = "gate/ess"
"""The metric of an update that says how evenly its rows were weighted."""
SHARES, ROLLED_BACK = "shares", "rolled back"
"""Keys in a checkpoint: the updates' effective shares since the last check; that an alarm brought its state back."""
_log = logging.getLogger("danceopd")


class Monitor:
    """All checks so far. `folder` None writes and logs nothing: another process does.

    `judge` says who judges, `lines` are the checks of before (`read_lines`). `alarms` are those of the last check.
    """

    def __init__(
        self, options: Options, probes: Sequence[ProbeSet], judge: str, folder: Path | None = None,
        lines: Sequence[dict[str, Any]] = (),
    ) -> None:  # fmt: skip
        self.options, self.probes, self.judge, self.folder = options, list(probes), judge, folder
        self.limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
        self.alarms: list[str] = []
        self.shares: list[float] = []  # of the updates since the last check
        self._lines = list(lines)
        random = RandomState.now()
        for one in self.probes:
            one.calibrate()
            if self._lines:
                one.usual_spread = self._lines[0]["usual"].get(one.name, one.usual_spread)
        random.restore()

    @property
    def begun(self) -> bool:
        """Whether there is a check to compare with."""
        return bool(self._lines)

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Keep the effective share of an update's row weights, where its metrics have it."""
        if EFFECTIVE in metrics:
            self.shares.append(metrics[EFFECTIVE])

    def check(self, step: int, student: VelocityField) -> dict[str, float | str]:
        """Measure the student; returns figures for the log."""
        began, random = time.monotonic(), RandomState.now()
        measured = {probes.name: probes.measure(student) for probes in self.probes}
        history = _history(self._lines)
        for probes in self.probes:
            one, before = measured[probes.name], history.setdefault(probes.name, [])
            if not before:
                probes.usual_spread = min(probes.usual_spread, one.spread)
            before.append(_check(one, probes.usual_spread))
        confidences = _confidences(list(measured.values()))
        share = sum(self.shares) / len(self.shares) if self.shares else None
        self.shares = []
        self.alarms = alarms(self.limits, confidences, history, share)
        random.restore()
        for sentence in self.alarms if self.folder else ():
            _log.warning("monitor, step %d: %s", step, sentence)
        pairs = {name: {"mistakes": asdict(a), "spearman": asdict(b)} for name, (a, b) in confidences.items()}
        line = {
            "step": step,
            "confidences": pairs,
            "probes": {probes.name: asdict(history[probes.name][-1]) for probes in self.probes},
            "usual": {probes.name: probes.usual_spread for probes in self.probes},
            "effective": share,
            "alarms": self.alarms,
            "seconds": round(time.monotonic() - began, 3),
        }
        self._write(line)
        return self._figures(line)

    def roll_back(self, step: int, back: int) -> None:
        """Note that the state after `back` was brought back because of the alarms of `step`."""
        if self.folder:
            then = "goes on as plain distillation" if self.options.rollback == "plain" else "ends there"
            _log.warning("monitor, step %d: the state after step %d is restored, and the run %s", step, back, then)
        self._write({"step": step, "rolled_back_to": back, "then": self.options.rollback, "why": self.alarms})

    def sentences(self) -> list[str]:
        """What the model card says: who judged, how often, and every alarm."""
        checks = [line for line in self._lines if "probes" in line]
        sentences = [f"Monitored at {len(checks)} steps, judged by {self.judge}; no training used that judge."]
        for line in self._lines:
            if "rolled_back_to" in line:
                sentences.append(f"After step {line['step']} the state of step {line['rolled_back_to']} was restored.")
            else:
                sentences += [f"Step {line['step']}: {sentence}." for sentence in line["alarms"]]
        return sentences if any(line.get("alarms") for line in checks) else [*sentences, "There was no alarm."]

    def _figures(self, line: Mapping[str, Any]) -> dict[str, float | str]:
        """Flat names for metrics.jsonl and TensorBoard."""
        found: dict[str, float | str] = {"monitor/alarms": float(len(self.alarms))}
        for name, figures in line["confidences"].items():
            found[f"monitor/mistakes of {name}"] = figures["mistakes"]["value"]
            found[f"monitor/rank correlation of {name}"] = figures["spearman"]["value"]
        for name, figures in line["probes"].items():
            shown = {"score": "score", "best": "best of seeds", "strength": "strength", "diversity": "diversity"}
            shown |= {} if figures["open_shift"] is None else {"open_shift": "open shift"}
            found |= {f"monitor/{words} {name}": figures[what] for what, words in shown.items()}
        if line["effective"] is not None:
            found["monitor/effective"] = line["effective"]
        if self.alarms:
            found["monitor/alarm"] = "; ".join(self.alarms)
        return found

    # -- files ----------------------------------------------------------------------------------------

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if self.folder is None:
            return
        with disk_errors(self.folder / LINES):
            with open(self.folder / LINES, "a", encoding="utf-8") as file:
                file.write(json.dumps(json_safe(line)) + "\n")
            write_json(self.folder / SUMMARY, self.summary())

    def summary(self) -> dict[str, Any]:
        """All checks, without the prompts' own scores."""
        checks = [line for line in self._lines if "probes" in line]
        short = [
            {**line, "probes": {n: {k: v for k, v in p.items() if k != "scores"} for n, p in line["probes"].items()}}
            for line in checks
        ]
        return {
            "judge": self.judge,
            "prompts": {probes.name: probes.prompts for probes in self.probes},
            "seeds": self.options.seeds,
            "limits": asdict(self.limits),
            "checks": short,
            "alarms": [{"step": line["step"], "sentence": s} for line in checks for s in line["alarms"]],
            "rolled_back": [line for line in self._lines if "rolled_back_to" in line],
        }


def read_lines(folder: Path, step: int, rolled_back: bool) -> list[dict[str, Any]]:
    """The lines of `monitor.jsonl` up to `step`; what was written after it is dropped, and will be checked anew.

    `rolled_back`: an alarm brought this state back (`Monitor.roll_back`), and the checks before that are kept.
    """
    path = folder / LINES
    if not path.is_file():
        return []
    lines = list(_readable(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    backs = [i for i, line in enumerate(lines) if "rolled_back_to" in line] if rolled_back else []
    kept = backs[-1] + 1 if backs else 0
    found = lines[:kept] + [line for line in lines[kept:] if line["step"] <= step and "probes" in line]
    with disk_errors(path):
        write_atomic(path, "".join(json.dumps(json_safe(line)) + "\n" for line in found).encode())
    return found


def _history(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Check]]:
    """The checks by probe set; those that a roll-back undid are gone."""
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        if "rolled_back_to" in line:
            kept = [one for one in kept if one["step"] <= line["rolled_back_to"]]
        else:
            kept.append(line)
    found: dict[str, list[Check]] = {}
    for line in kept:
        for name, check in line["probes"].items():
            found.setdefault(name, []).append(Check(**check))
    return found


def _check(measured: Measurement, usual_spread: float) -> Check:
    confidence = {name: float(values.mean()) for name, values in measured.confidences.items()}
    ratio = measured.spread / usual_spread if usual_spread > 0 else 1.0
    scores = measured.score.mean(1).tolist()
    best = float(measured.score.max(1).mean())
    return Check(float(measured.score.mean()), confidence, measured.strength, ratio, scores, best, measured.open_shift)


def _confidences(measured: Sequence[Measurement]) -> dict[str, tuple[Interval, Interval]]:
    """Of each confidence, over the probe sets that have it: the rate of confident mistakes and the rank correlation."""
    found = {}
    for name in dict.fromkeys(name for one in measured for name in one.confidences):
        pairs = [(one.confidences[name], one.score) for one in measured if name in one.confidences]
        if all(math.isfinite(float(part.sum())) for pair in pairs for part in pair):
            found[name] = mistakes(pairs), spearman(pairs)
    return found


def _readable(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Lines that are whole; a process may have been killed in the middle of the last."""
    for line in lines:
        try:
            found = _numbers(json.loads(line))
        except ValueError:
            continue
        if isinstance(found, dict):
            yield {OLD_KEYS.get(str(key), str(key)): value for key, value in found.items()}


def _numbers(value: Any) -> Any:
    """What `json_safe` wrote, as numbers again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class MonitorCallback(Callback):
    """Checks the EMA at the start and every `every` steps (0: never).

    `probes` (the probe sets and who judges) is None in processes that do not check, `run` in all but the first.
    `shared`: all processes check together, on a sharded backbone.
    """

    def __init__(
        self, options: Options, every: int, probes: tuple[list[ProbeSet], str] | None, run: RunDirectory | None,
        processes: Processes, shared: bool = False,
    ) -> None:  # fmt: skip
        self.options, self.every, self.probes, self.run = options, every, probes, run
        self.processes, self.shared = processes, shared
        self.monitor: Monitor | None = None
        self._shares: list[float] = []
        self._rolled_back = False

    def due(self, step: int, steps: int) -> bool:
        """Whether there is a check after update `step` of `steps`."""
        return self.every > 0 and (step == steps or step % self.every == 0)

    @property
    def alarmed(self) -> bool:
        """Whether the last check had an alarm; all processes call it."""
        return self.processes.broadcast(self.monitor is not None and bool(self.monitor.alarms))

    def on_train_start(self, trainer: Trainer) -> None:
        if self.probes is None:
            return
        lines = [] if self.run is None else read_lines(self.run.path, trainer.step, self._rolled_back)
        lines = self.processes.broadcast(lines) if self.shared else lines
        self.monitor = Monitor(self.options, *self.probes, None if self.run is None else self.run.path, lines)
        self.monitor.shares = list(self._shares)
        if not self.monitor.begun:
            figures = self.monitor.check(trainer.step, trainer.ema_field())
            if self.run is not None:
                self.run.logger.log(trainer.step, **figures)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self.monitor is None:
            return
        self.monitor.note(metrics.extra)
        if self.due(trainer.step, trainer.steps):
            metrics.extra |= self.monitor.check(trainer.step, trainer.ema_field())

    def state_dict(self) -> dict[str, Any]:
        shares = [] if self.monitor is None else self.monitor.shares
        return {SHARES: list(shares)} if shares else {}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self._shares, self._rolled_back = list(state.get(SHARES, [])), ROLLED_BACK in state

    def sentences(self) -> list[str]:
        """What the model card says."""
        return [] if self.monitor is None else self.monitor.sentences()


class Rollback(Callback):
    """Keeps the state of every check without an alarm; the first alarm brings the last of them back exactly.

    Weights, EMA, optimizer and random states are restored, what was saved and logged after them is dropped, and the run
    goes on without the hook and with the teachers' own velocities (plain), or ends there and exports that state (stop).
    It happens once: a plain run that alarms is not saved by going back again. To stand behind the callbacks that log.
    """

    def __init__(self, monitor: MonitorCallback, checkpoints: Checkpoints) -> None:
        self.monitor, self.checkpoints, self.run = monitor, checkpoints, monitor.run
        self.kind, self.done = monitor.options.rollback, False

    @property
    def ended(self) -> bool:
        """Whether an alarm ended the run."""
        return self.done and self.kind == "stop"

    @property
    def _armed(self) -> bool:
        return self.kind is not None and self.monitor.every > 0 and not self.done

    def on_train_start(self, trainer: Trainer) -> None:
        if self._armed:  # there is no better state yet
            self.checkpoints.save(trainer, good=True)
        trainer.should_stop |= self.ended

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        step = trainer.step
        if not self._armed or not self.monitor.due(step, trainer.steps):
            return
        if not self.monitor.alarmed:
            self.checkpoints.save(trainer, good=True)
            return
        hook, trainer.hook = trainer.hook, None
        if self.checkpoints.restore(trainer, good=True) is None:
            trainer.hook = hook
            if self.run is not None:
                _log.warning("monitor, step %d: there is no good state to restore", step)
            return
        self.done = True
        _go_plain(trainer)
        if self.monitor.monitor is not None:
            self.monitor.monitor.roll_back(step, trainer.step)
        self.checkpoints.save(trainer)
        if self.run is not None:
            self.run.forget(trainer.step)
            self.run.logger.log(trainer.step, **{"monitor/rolled back from": float(step)})
        trainer.should_stop = self.ended  # early stopping may have spent its patience on what was undone

    def state_dict(self) -> dict[str, Any]:
        return {ROLLED_BACK: True} if self.done else {}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self.done |= ROLLED_BACK in state
        if self.done:
            _go_plain(trainer)


def _go_plain(trainer: Trainer) -> None:
    """Plain distillation from now on: no gates, no ranked samples, no moved targets."""
    trainer.hook = None
    fields = [field.field if isinstance(field, ContrastField) else field for field in trainer.velocities.teachers]
    trainer.velocities = replace(trainer.velocities, teachers=fields)
