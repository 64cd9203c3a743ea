"""The run directory: what a merge writes, so that it can be watched, trusted and continued.

    recipe.yaml  data.json  teachers.json  metrics.jsonl  logs/  samples/step-000050.png  gap.json  gap.png
    checkpoints/step-000050/{state.safetensors,meta.json,manifest.json}
    checkpoints/good-000050/…  watch.jsonl  watch.json      of a watched run (danceopd.watch)

A checkpoint appears by one rename after everything in it reached the disk, and its manifest names the sha256 of
every file, so the newest one is complete or is passed over. Continuing drops what was logged after it: nothing
counts twice. Nothing is pickled; a full disk is a sentence, and leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from .disk import disk_faults, lock, part_of, replace_file, sha256, sweep, sync
from .errors import UserError
from .random_state import RandomState
from .recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

STATE, META, MANIFEST = "state.safetensors", "meta.json", "manifest.json"
FINISHED = "finished.json"
LEARNING = ("data.json", "teachers.json", "gap.json", "gap.png", "watch.json")
"""What a run writes as it begins, which says nothing where nothing was learnt. (`load` drops the metrics.)"""
_log = logging.getLogger("danceopd")


class Saved(NamedTuple):
    """A checkpoint as it was saved: after which step, the tensors, plain facts, each process's random state."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    random: list[RandomState]


class RunFolder:
    """The output folder of one recipe. Making it creates, continues or refuses the folder, and locks it."""

    def __init__(self, output: str | Path, recipe: Recipe) -> None:
        self.path = Path(output)
        self.recipe = recipe
        self._writer: Any = None
        self._damaged: set[Path] = set()
        with disk_faults(self.path):
            self._refuse_foreign()
            for name in ("", "checkpoints", "samples"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / ".lock")
            if (self.path / "recipe.yaml").is_file():
                self._refuse_foreign()  # whoever held the lock may have learnt something
            if not self._learnt:
                for name in LEARNING:
                    (self.path / name).unlink(missing_ok=True)
            replace_file(self.path / "recipe.yaml", recipe.to_yaml().encode())
            for leftover in self._checkpoints.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            sweep(self.path / "samples")

    @classmethod
    def check(cls, output: str | Path, recipe: Recipe) -> None:
        """Refuses what making the folder would refuse, and makes nothing."""
        folder = cls.__new__(cls)
        folder.path, folder.recipe = Path(output), recipe
        folder._refuse_foreign()

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _learnt(self) -> bool:
        """Whether a run got as far as its first checkpoint here, or a student stands here."""
        saved = any(self._steps(kind) for kind in ("step", "good"))
        return saved or any((self.path / name).exists() for name in (FINISHED, "pytorch_lora_weights.safetensors"))

    def _refuse_foreign(self) -> None:
        """UserError for what is no run, and for the run of another recipe that has learnt something."""
        if not self.path.is_dir() or not any(p.name != ".lock" for p in self.path.iterdir()):
            return
        theirs = self.path / "recipe.yaml"
        if not theirs.is_file() or not self._checkpoints.is_dir():
            raise UserError(
                f"output folder {self.path} holds files that are not a run of danceopd; choose another --output"
            )
        if not self._learnt:  # refused on its way to the first step, most likely: the next one may be mended
            return
        try:
            there = Recipe.from_yaml(theirs).identity()
        except UserError as error:
            raise UserError(
                f"output folder {self.path} holds another run, whose recipe does not resolve here ({error}); "
                "choose another --output"
            ) from None
        here = self.recipe.identity()
        for key, old, new in differences(there, here):
            raise UserError(
                f"output folder {self.path} holds another run ({key} is {old!r} there and {new!r} here); "
                "choose another --output, or delete that folder to start anew"
            )

    # -- the end --------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether a run of at least as many steps, or one that the watch or the gap ended, has been exported here."""
        try:
            done = json.loads((self.path / FINISHED).read_text())
        except (OSError, ValueError):
            return False
        ended = done.get("stopped") is True and self.recipe.watch.rollback == "stop"
        ended = ended or done.get("patience") == (self.recipe.gap.patience or 0)
        return (
            (ended or int(done.get("step", -1)) >= self.recipe.steps)
            and (self.path / "pytorch_lora_weights.safetensors").is_file()
        )

    def finish(self, step: int, **facts: Any) -> None:
        """Marks the run as finished after `step` updates (its export already stands in the folder)."""
        with disk_faults(self.path):
            replace_file(self.path / FINISHED, json.dumps({"step": step, **facts}, indent=1).encode())
        self.close()

    def close(self) -> None:
        """Closes the logs and frees the folder for another process."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- checkpoints ----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        random: Sequence[RandomState] | None = None,
        good: bool = False,
    ) -> Path:
        """Writes `checkpoints/step-000050` and the like, whole or not at all, and forgets all but the last `keep_last`,
        and those that were found damaged.

        `random` is the state of every process's random generators, by rank; None: there is this one. A `good` one
        stands apart, as `checkpoints/good-000050`: nothing replaces it but the next such.
        """
        final = self._checkpoints / f"{'good' if good else 'step'}-{step:06d}"
        part = part_of(final)
        before = part.with_name(f"{part.name}.old")
        states = [RandomState.now()] if random is None else random
        drawn = {f"{_rng(rank)}{key}": value for rank, one in enumerate(states) for key, value in one.tensors.items()}
        facts = {
            "step": step, "meta": dict(meta), "random": states[0].plain, "others": [one.plain for one in states[1:]]
        }  # fmt: skip
        with disk_faults(final):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                save_file(_apart({**tensors, **drawn}), part / STATE)
                sync(part / STATE)
                replace_file(part / META, json.dumps(facts).encode())
                hashes = {name: sha256(part / name) for name in (STATE, META)}
                replace_file(part / MANIFEST, json.dumps(hashes, indent=1).encode())
                sync(part)
                if final.exists():
                    os.replace(final, before)
                os.replace(part, final)
                sync(self._checkpoints)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        self._damaged.discard(final)
        for old in (before, *self._damaged):  # first, for a damaged one is none of those to keep
            shutil.rmtree(old, ignore_errors=True)
        self._damaged.clear()
        for old in self._steps("good")[:-1] if good else self._steps()[: -self.recipe.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self, kind: str = "step") -> Path | None:
        """The newest complete checkpoint of a kind; a damaged one is passed over with a warning."""
        for folder in reversed(self._steps(kind)):
            try:
                fault = _fault(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fault = str(error)
            if fault is None:
                return folder
            _log.warning("checkpoint %s is damaged and is passed over: %s", folder, fault)
            self._damaged.add(folder)
        return None

    def load(self) -> Saved | None:
        """What `latest()` holds; what was logged after it is dropped."""
        folder = self.latest()
        saved = None if folder is None else self._read(folder)
        self._truncate(-1 if saved is None else saved.step)
        return saved

    def good(self) -> Saved | None:
        """The last good checkpoint (see `save`)."""
        folder = self.latest("good")
        return None if folder is None else self._read(folder)

    def forget(self, step: int) -> None:
        """Drops what was saved and logged after a step."""
        for folder in self._steps():
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder, ignore_errors=True)
        self._truncate(step)
        if self._writer is not None:  # the next one drops what TensorBoard has of later steps
            self._writer.close()
            self._writer = None

    def _read(self, folder: Path) -> Saved:
        facts = json.loads((folder / META).read_text())
        tensors = load_file(folder / STATE)
        states = []
        for rank, plain in enumerate([facts["random"], *facts.get("others", [])]):
            mine = [key for key in tensors if key.startswith(_rng(rank))]
            states.append(RandomState({key.removeprefix(_rng(rank)): tensors.pop(key) for key in mine}, plain))
        return Saved(facts["step"], tensors, facts["meta"], states)

    def _steps(self, kind: str = "step") -> list[Path]:
        return sorted(p for p in self._checkpoints.glob(f"{kind}-*") if p.is_dir())

    # -- logs -----------------------------------------------------------------------------------------

    def log(self, step: int, **scalars: float | str | None) -> None:
        """One line in metrics.jsonl; the numbers go to TensorBoard too."""
        line = json.dumps({"step": step, **{key: _plain(value) for key, value in scalars.items()}})
        with disk_faults(self.path / "metrics.jsonl"), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.chart(step, **scalars)

    def chart(self, step: int, **scalars: float | str | None) -> None:
        """Numbers for TensorBoard alone."""
        with disk_faults(self.path / "logs"):
            for key, value in scalars.items():
                if isinstance(_plain(value), (int, float)):
                    self._tensorboard(step).add_scalar(key, float(value), step)  # type: ignore[arg-type]

    def picture(self, step: int) -> Path:
        """Where the sample grid of a step is, or would be."""
        return self.path / "samples" / f"step-{step:06d}.png"

    def image(self, step: int, image: Image.Image) -> Path:
        """`samples/step-000050.png` and the like, and the same picture in TensorBoard."""
        path = self.picture(step)
        part = part_of(path)
        with disk_faults(path):
            image.save(part, format="PNG")
            os.replace(part, path)
            self._tensorboard(step).add_image("samples", np.array(image.convert("RGB")), step, dataformats="HWC")
        return path

    def _tensorboard(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "logs"), purge_step=step, flush_secs=10)
        return self._writer

    def _truncate(self, step: int) -> None:
        """Keeps the metrics up to `step`; a half-written line at the end goes too."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        with disk_faults(path):
            replace_file(path, "".join(kept).encode())


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; OSError, ValueError and the like say it too."""
    facts = json.loads((folder / META).read_text())
    if (folder / MANIFEST).exists() or "sha256" not in facts:
        hashes = json.loads((folder / MANIFEST).read_text())
    else:  # of before there were manifests
        hashes = {STATE: facts["sha256"], META: None}
    for name in (STATE, META):
        if hashes[name] not in (None, sha256(folder / name)):
            return f"its {name} is not the one that was saved"
    return None


def _rng(rank: int) -> str:
    """What the names of a process's random states begin with."""
    return f"rng{rank or ''}."


def differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: key, and what it is in each."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            found
            for name in dict.fromkeys([*there, *here])
            for found in differences(there.get(name), here.get(name), f"{key}.{name}".lstrip("."))
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here))
        return [found for i, (old, new) in pairs for found in differences(old, new, f"{key}.{i}")]
    return [] if there == here else [(key, there, here)]


def _plain(value: Any) -> float | str | None:
    """A number JSON can hold: tensors become floats, NaN and infinities their names."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if np.isfinite(number) else str(number)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, no two sharing memory: what safetensors wants."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        owner = value.untyped_storage().data_ptr()
        out[name] = value.clone() if owner in seen else value
        seen.add(owner)
    return out
