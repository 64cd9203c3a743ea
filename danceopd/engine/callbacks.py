"""The two places where optional parts plug into the trainer, which knows none of them by name.

A `Callback` watches a run: checkpoints, logs, samples, validation, early stopping, the monitor, limits, and the user's
own, which are plug-ins. A `QueryHook` changes how a batch is queried and how much an answer counts (the label-free
gates), or gives it pictures to learn from (the student's own, ranked). Both keep what must survive an interruption in
their `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from danceopd.errors import UserError
from danceopd.plugins import KINDS, check_made, check_options, load

if TYPE_CHECKING:
    from danceopd.data.dataset import Dataset
    from danceopd.engine.batches import Batch, Draw
    from danceopd.engine.metrics import StepMetrics
    from danceopd.engine.trainer import Trainer
    from danceopd.engine.velocities import Velocities


class Callback:
    """Override what you need; callbacks are called in their order.

    `on_step_end` may set `trainer.should_stop`, add figures to `metrics.extra`, or restore an earlier state: then the
    callbacks after it are not called for this step.
    """

    def on_train_start(self, trainer: Trainer) -> None: ...

    def on_step_start(self, trainer: Trainer) -> None: ...

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None: ...

    def sentences(self) -> list[str]:
        """What the model card says of it."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """`state` is all that the checkpoint holds, of the trainer and of every callback."""


@dataclass
class Reporter(Callback):
    """Calls `report(metrics, steps)` after every update."""

    report: Callable[[StepMetrics, int], None]

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.report(metrics, trainer.steps)


@dataclass
class OwnCallback(Callback):
    """A callback of the user's, a plug-in, whose part of a checkpoint is kept apart from that of all others."""

    name: str
    callback: Callback

    def on_train_start(self, trainer: Trainer) -> None:
        self.callback.on_train_start(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        self.callback.on_step_start(trainer)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.callback.on_step_end(trainer, metrics)

    def sentences(self) -> list[str]:
        return self.callback.sentences()

    def state_dict(self) -> dict[str, Any]:
        return {f"callback {self.name}.{key}": value for key, value in self.callback.state_dict().items()}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Nothing where the checkpoint was saved without this callback."""
        start = f"callback {self.name}."
        mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if mine:
            self.callback.load_state_dict(trainer, mine)


def check_callback(name: str, options: Mapping[str, Any]) -> Any:
    """A plug-in's callback, or what makes it; UserError where it is neither or does not take the options."""
    found = load("callback", name, fits=lambda value: callable(value) or isinstance(value, Callback))
    made = isinstance(found, Callback)
    if made and options:
        raise UserError(f"callback {name} is made already, so it takes no options; leave them out, or name its class")
    if isinstance(found, type) and not issubclass(found, Callback):
        raise UserError(f"callback {name} is the class {found.__name__}; it must be {KINDS['callback'].must}")
    if not made:
        check_options("callback", name, found, options)
    return found


def own_callbacks(named: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """The callbacks of a recipe's `callbacks`; UserError as `check_callback`, and where a function makes none."""
    made: list[Callback] = []
    for name, options in named.items():
        found = check_callback(name, options)
        callback = found if isinstance(found, Callback) else found(**options)
        check_made("callback", name, callback, isinstance(callback, Callback))
        made.append(OwnCallback(name, callback))
    return made


@dataclass(frozen=True)
class RowWeights:
    """How much the B rows of one query count: `rows (B,)`, `tokens` (None: all equal), and the velocity to learn.

    `metrics` are figures by name, (B,) each, NaN where a figure means nothing for a row.
    """

    rows: Tensor
    tokens: Tensor | None
    target: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Answers(Protocol):
    """What frozen fields answered at one state."""

    def weights(self, velocity: Tensor) -> RowWeights:
        """Weights and targets, given the student's `velocity (B, …)` without a gradient."""
        ...


class BatchHook(Protocol):
    """A hook's part in one batch."""

    def rollout(self, batch: Batch, velocities: Velocities) -> Tensor:
        """States (B, K, …) at the batch's queries, which it may move (`Batch.set_queries`)."""
        ...

    def query(self, batch: Batch, velocities: Velocities, x: Tensor, sigma: Tensor, teacher: Tensor) -> Answers:
        """Query frozen fields besides the teachers, whose velocities (B, …) at `x`, `sigma` are `teacher`."""
        ...


class QueryHook(Protocol):
    """Called by the trainer once an update (`begin_step`, `end_step`), and by the batches once a batch."""

    metric_names: Sequence[str]

    def begin_step(self, step: int, draw: Draw) -> None:
        """See what the update drew."""
        ...

    def dataset(self, group: int) -> Dataset:
        """Where the conditions of this group of rows come from."""
        ...

    def begin_batch(self, batch: Batch, groups: Sequence[int], layout: Sequence[int]) -> BatchHook | None:
        """`groups` are those of the batch's rows, `layout` all groups of the update with the batch's layout.

        None for a hook that leaves the queries as they are; it may give the batch pictures to learn from (`ranked`).
        """
        ...

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """Names for the log from the means of `metric_names` over the update's rows."""
        ...

    def end_step(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Take in what the update noted; `all_reduce` sums a tensor over the processes, in place."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
