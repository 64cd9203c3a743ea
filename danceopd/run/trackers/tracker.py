"""Experiment trackers of a run: accelerate's, opened for the run's folder, fed by its `Logger`.

A tracker gets what `metrics.jsonl` gets, and each sample grid as a picture. One with a server of its own is opened
before a model is loaded; a run that is continued goes on in the same run there, whose id is in the run folder. If its
server fails later the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from danceopd.common.files import write_json
from danceopd.common.messages import clipped
from danceopd.common.parse import read_json
from danceopd.errors import UserError
from danceopd.run.card import without_paths

if TYPE_CHECKING:
    from PIL import Image

    from danceopd.recipe.recipe import Recipe

IDS = "trackers.json"
"""In the run folder: the id of the run at each tracker that has one."""
PROJECT = "danceopd"
_log = logging.getLogger("danceopd")


class Tracker:
    """A tracker that is opened with `start`, or by the first figure. `facts` are the recipe's values by dotted key.

    `options` are keyword arguments of accelerate's tracker of that name.
    """

    name = ""

    def __init__(self, options: Mapping[str, Any], folder: Path, facts: Mapping[str, Any]) -> None:
        self.options, self.folder, self.facts = dict(options), folder, facts
        self.opened: Any = None
        self.lost = False

    def start(self) -> None:
        """Open what has a server; UserError where that does not work."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of a step, by name."""
        raise NotImplementedError

    def picture(self, step: int, image: Image.Image, path: Path) -> None:
        """The sample grid of a step, which is in the file `path`."""
        raise NotImplementedError

    def forget(self) -> None:
        """What was logged after a step counts no more; the next figure is of an earlier one."""

    def close(self) -> None:
        """Write out what is left; the next figure opens it again."""
        opened, self.opened = self.opened, None
        if opened is not None and not self.lost:
            opened.finish()


class TensorBoard(Tracker):
    """Files in the run folder's `logs`, of which those after the first figure's step count no more."""

    name = "tensorboard"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._at(step).log(dict(values), step=step)

    def picture(self, step: int, image: Image.Image, path: Path) -> None:
        pixels = np.array(image.convert("RGB"))[None]
        self._at(step).log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def forget(self) -> None:
        self.close()

    def _at(self, step: int) -> Any:
        if self.opened is None:
            from accelerate.tracking import TensorBoardTracker

            _know_this_process()
            options = {"logging_dir": str(self.folder), "purge_step": step, "flush_secs": 10, **self.options}
            tracker = TensorBoardTracker("logs", **options)
            tracker.start()
            self.opened = tracker
        return self.opened


class _Served(Tracker):
    """A tracker with a server, where a run has an id."""

    def start(self) -> None:
        if self.opened is not None:
            return
        ids = self.folder / IDS
        known = read_json(ids, "the ids of trackers") if ids.is_file() else {}
        try:
            _know_this_process()
            opened = self.open(known.get(self.name))
            opened.start()
            if self.name not in known:
                opened.store_init_configuration(dict(self.facts))
        except Exception as error:
            again = f", delete {ids} to begin another run there" if self.name in known else ""
            raise UserError(
                f"tracker {self.name} does not start ({_reason(error)}); mend that{again}, or leave it out of trackers"
            ) from error
        self.opened = opened
        self.ready()
        write_json(ids, {**known, self.name: self.run_id})

    def open(self, run_id: str | None) -> Any:
        """accelerate's tracker, which has not started, of a new run or of the one with this id."""
        raise NotImplementedError

    def ready(self) -> None:
        """Called when it has started."""

    @property
    def run_id(self) -> str:
        """The id of the run."""
        raise NotImplementedError

    def tell(self, what: Callable[[], None]) -> None:
        """Call `what` with the tracker open. A failing server is said once and ends the tracker, not the run."""
        if self.lost:
            return
        try:
            self.start()
            what()
        except Exception as error:
            self.lost = True
            _log.warning("tracker %s fails (%s); the run goes on without it, and metrics.jsonl has all figures",
                         self.name, _reason(error))  # fmt: skip

    def close(self) -> None:
        try:
            super().close()
        except Exception as error:
            _log.warning("tracker %s does not close (%s)", self.name, _reason(error))


class WandB(_Served):
    """Weights & Biases. Figures are drawn over their own `step`, for its count of calls can only rise."""

    name = "wandb"

    def open(self, run_id: str | None) -> Any:
        from accelerate.tracking import WandBTracker

        given = {"id": run_id, "resume": "allow", "name": self.folder.resolve().name, "dir": str(self.folder)}
        options = {**given, **self.options}
        return WandBTracker(options.pop("project", PROJECT), **options)

    def ready(self) -> None:
        self.opened.tracker.define_metric("step")
        self.opened.tracker.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        return str(self.opened.tracker.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tell(lambda: self.opened.log({**values, "step": step}))

    def picture(self, step: int, image: Image.Image, path: Path) -> None:
        from wandb import Image as Picture

        self.tell(lambda: self.opened.log({"samples": Picture(image), "step": step}))


class MLflow(_Served):
    """MLflow, at the server that its environment variables name."""

    name = "mlflow"

    def open(self, run_id: str | None) -> Any:
        from accelerate.tracking import MLflowTracker

        options = {"run_id": run_id, "name": self.folder.resolve().name, **self.options}
        return MLflowTracker(options.pop("project", PROJECT), run_name=options.pop("name"), **options)

    @property
    def run_id(self) -> str:
        return str(self.opened.tracker.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tell(lambda: self.opened.log(dict(values), step=step))

    def picture(self, step: int, image: Image.Image, path: Path) -> None:
        self.tell(lambda: self.opened.log_artifact(str(path), artifact_path="samples"))


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow)}


def trackers_of(recipe: Recipe, folder: Path) -> list[Tracker]:
    """The trackers that a recipe names, for the run in `folder`; none of them is opened yet."""
    facts = without_paths({key: value for key, value in recipe.resolved().items() if key != "trackers"})
    return [KINDS[name](options, folder, dict(_flat(facts))) for name, options in recipe.trackers.items()]


def check_trackers(trackers: Mapping[str, Any]) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without a file it is a folder of that name, as wandb makes
            raise UserError(f"tracker {name} is not installed; pip install {name}, or leave it out of trackers")


def _flat(facts: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Plain data as single values by dotted key."""
    if isinstance(facts, dict | list) and facts:
        for name, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
            yield from _flat(value, f"{key}.{name}".lstrip("."))
    elif key:
        yield key, json.dumps(facts) if isinstance(facts, dict | list) else facts


def _know_this_process() -> None:
    """accelerate's trackers log what they do, for which it must know the process."""
    from accelerate import PartialState

    PartialState()


def _reason(error: Exception) -> str:
    return clipped(" ".join(str(error).split()) or type(error).__name__, 160)
