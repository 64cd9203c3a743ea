"""Checkpoints of a run: saved by one rename, verified by hashes, restored exactly.

`CheckpointStore` is the folder. A checkpoint appears after everything in it reached the disk, and its manifest names
the sha256 of every file, so the newest one is complete or is passed over; a full disk leaves the one before as it was.
`Checkpoints` is the callback: it saves what the trainer and every callback give as their `state_dict`, with each
process's random state, and hands all of it back to each of them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, fsync_path, numbered_folders, partial_path, sha256, write_atomic
from danceopd.common.messages import shown
from danceopd.common.parse import parse_json
from danceopd.common.rng import RandomState
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.optimizer import Diverged
from danceopd.engine.trainer import Trainer
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.run.directory import RunDirectory

STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"
_log = logging.getLogger("danceopd")


class Checkpoint(NamedTuple):
    """As it was saved: after which step, the tensors, plain facts, each process's random state."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    random: list[RandomState]


class CheckpointStore:
    """The folder of checkpoints: `step-000050` and the like, of which the last `keep_last` stay.

    A `good` one stands apart, as `good-000050`: nothing replaces it but the next such.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._damaged: set[Path] = set()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any],
        random: Sequence[RandomState] | None = None, good: bool = False,
    ) -> Path:  # fmt: skip
        """Writes one, whole or not at all, and forgets those that are too old or were found damaged.

        `random` is the state of every process's random generators, by rank; None: there is this one.
        """
        final = self.folder / f"{'good' if good else 'step'}-{step:06d}"
        part = partial_path(final)
        before = part.with_name(f"{part.name}.old")
        states = [RandomState.now()] if random is None else random
        drawn = {f"{_rng(rank)}{key}": value for rank, one in enumerate(states) for key, value in one.tensors.items()}
        facts = {
            "step": step, "meta": dict(meta), "random": states[0].plain, "others": [one.plain for one in states[1:]]
        }  # fmt: skip
        with disk_errors(final):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                save_file(_contiguous({**tensors, **drawn}), part / STATE)
                fsync_path(part / STATE)
                write_atomic(part / META, json.dumps(facts).encode())
                hashes = {name: sha256(part / name) for name in (STATE, META)}
                write_atomic(part / MANIFEST, json.dumps(hashes, indent=1).encode())
                fsync_path(part)
                if final.exists():
                    os.replace(final, before)
                os.replace(part, final)
                fsync_path(self.folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        self._damaged.discard(final)
        for old in (before, *self._damaged):  # first, for a damaged one is none of those to keep
            shutil.rmtree(old, ignore_errors=True)
        self._damaged.clear()
        for old in self._all("good")[:-1] if good else self._all()[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self, kind: str = "step") -> Path | None:
        """The newest complete checkpoint of a kind, "step" or "good"; a damaged one is passed over with a warning."""
        for folder in reversed(self._all(kind)):
            try:
                fault = _fault(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fault = str(error)
            if fault is None:
                return folder
            _log.warning("checkpoint %s is damaged and is passed over: %s", folder, fault)
            self._damaged.add(folder)
        return None

    def load(self, kind: str = "step") -> Checkpoint | None:
        """What `latest(kind)` holds."""
        folder = self.latest(kind)
        if folder is None:
            return None
        facts = parse_json((folder / META).read_bytes())
        tensors = load_file(folder / STATE)
        states = []
        for rank, plain in enumerate([facts["random"], *facts.get("others", [])]):
            mine = [key for key in tensors if key.startswith(_rng(rank))]
            states.append(RandomState({key.removeprefix(_rng(rank)): tensors.pop(key) for key in mine}, plain))
        return Checkpoint(facts["step"], tensors, facts["meta"], states)

    def forget(self, step: int) -> None:
        """Drops the checkpoints after a step, but for a good one."""
        for folder in self._all():
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def _all(self, kind: str = "step") -> list[Path]:
        return numbered_folders(self.folder, kind)


class Checkpoints(Callback):
    """Saves every so many steps, at the end, and when the run should stop. `run` is the first process's alone.

    `parts` are the callbacks whose `state_dict` is kept; `facts` stand in every checkpoint.
    """

    def __init__(
        self, run: RunDirectory | None, processes: Processes, every: int, parts: Sequence[Callback],
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.run, self.processes, self.every, self.parts, self.facts = run, processes, every, list(parts), dict(facts)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        due = trainer.step % self.every == 0 and not trainer.optimizer.skipped  # while the loss is NaN, none is lost
        if trainer.should_stop or trainer.step == trainer.steps or due:
            self.save(trainer)

    def save(self, trainer: Trainer, good: bool = False) -> None:
        """Write one; a `good` one stands apart. All processes call it, the first writes."""
        states, tensors = self.processes.all_gather(RandomState.now()), trainer.state_dict()
        if self.run is None:
            return
        facts = dict(self.facts)
        for part in self.parts:
            for key, value in part.state_dict().items():
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    facts[key] = value
        self.run.checkpoints.save(trainer.step, tensors, facts, states, good)

    def rescue(self, trainer: Trainer) -> None:
        """After an error: save the last step if it ended with its callbacks, where this process is the only one."""
        trainer.optimizer.adamw.zero_grad(set_to_none=True)
        whole = trainer.ended == trainer.step and not trainer.optimizer.updating
        if self.processes.world_size == 1 and trainer.step and whole:
            self.save(trainer)

    def back_off(self, error: Diverged, lr: float) -> UserError:
        """After a loss that stayed NaN with a learning rate: drop the checkpoints whose state gave it, and note the
        rate in the run folder, where it may now be another one; the error with where the run goes on."""
        if self.run is None:
            return error
        saved = self.run.diverged(error.last, lr)
        goes_on = f"goes on after step {saved}" if saved else "starts anew"
        return UserError(
            f"{error}; with a lower optimizer.lr the same command {goes_on}, for other teachers choose another --output"
        )

    def restore(self, trainer: Trainer, good: bool = False) -> dict[str, Any] | None:
        """Bring back the newest whole one, or the last good one; its facts, if it is there.

        What was logged after the newest one is dropped, so that nothing counts twice.
        """
        saved = None if self.run is None else self.run.checkpoints.load("good" if good else "step")
        if self.run is not None and not good:
            self.run.logger.truncate(-1 if saved is None else saved.step)
        found = (None, [], {}) if saved is None else (saved.step, saved.random, saved.meta)
        step, random, facts = self.processes.broadcast(found)
        if step is None:
            return None
        tensors = self.processes.broadcast_tensors(None if saved is None else saved.tensors)
        try:
            for part in self.parts:  # first, for one of them may take the trainer's hook away
                part.load_state_dict(trainer, {**facts, **tensors})
            trainer.load_state_dict(step, tensors)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint of step {step} does not hold the state of this run ({type(error).__name__}: "
                f"{shown(str(error))}); delete it to continue from the one before, or choose another --output"
            ) from error
        if self.processes.rank < len(random):
            random[self.processes.rank].restore()
        return facts


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; OSError, ValueError and the like say it too."""
    facts = parse_json((folder / META).read_bytes())
    if (folder / MANIFEST).exists() or "sha256" not in facts:
        hashes = parse_json((folder / MANIFEST).read_bytes())
    else:  # of before there were manifests
        hashes = {STATE: facts["sha256"], META: None}
    for name in (STATE, META):
        if hashes[name] not in (None, sha256(folder / name)):
            return f"its {name} is not the one that was saved"
    return None


def _rng(rank: int) -> str:
    """What the names of a process's random states begin with."""
    return f"rng{rank or ''}."


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, no two sharing memory: what safetensors wants."""
    out: dict[str, Tensor] = {}
    owners: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        owner = value.untyped_storage().data_ptr()
        out[name] = value.clone() if owner in owners else value
        owners.add(owner)
    return out
