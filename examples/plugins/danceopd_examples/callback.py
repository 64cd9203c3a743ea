"""A callback: writes the loss into a file now and then, and stops the run where the loss is low enough."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.trainer import Trainer


class Notes(Callback):
    """Appends a line to `file` every so many steps; `below` ends the run after a step whose loss is lower."""

    def __init__(self, file: str = "notes.txt", every: int = 10, below: float = 0.0) -> None:
        self.file, self.every, self.below, self.lowest = Path(file), every, below, float("inf")

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.lowest = min(self.lowest, metrics.loss)
        metrics.extra["lowest_loss"] = self.lowest  # into metrics.jsonl and the log
        if metrics.step % self.every == 0 and trainer.batches.rank == 0:  # of several processes one writes
            with self.file.open("a") as out:
                out.write(f"step {metrics.step}: loss {metrics.loss:.4f}, lowest {self.lowest:.4f}\n")
        trainer.should_stop = trainer.should_stop or metrics.loss < self.below

    def sentences(self) -> list[str]:
        """A line of the model card."""
        return [f"The lowest loss of a step was {self.lowest:.4f}."]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"lowest": self.lowest}

    def load_state_dict(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self.lowest = state["lowest"]
