"""How much a row counts: the gates' weights multiplied, over their running mean; with no gate on, every row counts 1.

A gate gives weights above 0 to rows, and the evidence gate to tokens, from what frozen fields answer. Row weights
multiply; the product is divided by its running mean for the row's teacher, so that a gate sets priorities within a
capability and moves neither the learning rate nor the teachers' shares, and cut at `HIGHEST`. `RunningMeans` holds
these means, and those that rows are compared with: of the updates before this one alone, so that no weight depends on
how the rows of an update are split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

HIGHEST = 4.0
"""No row counts more."""
WINDOW, MIN_ROWS = 512, 16
"""Rows that a running mean looks back on, and those it must have before anything is compared with it."""
QUARTERS = 4
"""Equal parts of the noise level whose scores are compared apart: progress grows as the noise falls."""
METRICS = (
    "weight", "weight square", "weight zero", "rho", "delta positive", "shift share", "leak", "consensus", "critical",
    "guarded",
)  # fmt: skip
"""Metrics of a row; their means over the update are logged as `gate/…` (see `summary`)."""


class RunningMeans:
    """Means over the rows of the last updates: of scores and their squares by teacher and quarter of the noise level,
    of weights by teacher. `note` counts a row, `fold` takes the update's rows in, of all processes at once."""

    def __init__(self, teachers: int, device: torch.device) -> None:
        self.scores = torch.zeros(teachers * QUARTERS, 3, dtype=torch.float64, device=device)  # rows, mean, mean square
        self.weights = torch.zeros(teachers, 2, dtype=torch.float64, device=device)  # rows, mean
        self._noted = [torch.zeros_like(self.scores), torch.zeros_like(self.weights)]

    def spread(self, teachers: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scores that each row is compared with, (B,) each; deviation 0: too few seen."""
        count, mean, square = self.scores[self._cells(teachers, sigma)].unbind(1)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(count >= MIN_ROWS, deviation, torch.zeros_like(deviation)).float()

    def usual(self, teachers: Tensor) -> Tensor:
        """The mean weight of each row's teacher so far, (B,); exactly 1 until `MIN_ROWS` rows, or while all were 1."""
        count, mean = self.weights[teachers].unbind(1)
        return torch.where(count >= MIN_ROWS, mean, torch.ones_like(mean)).float()

    def note_scores(self, teachers: Tensor, sigma: Tensor, scores: Tensor, sound: Tensor) -> None:
        """Count the scores (B,) of the rows that are `sound`."""
        self._note(0, self._cells(teachers, sigma), scores, sound)

    def note_weights(self, teachers: Tensor, weights: Tensor, sound: Tensor) -> None:
        """Count the weights (B,) of the rows that are `sound`."""
        self._note(1, teachers, weights, sound)

    def fold(self, add: Callable[[Tensor], None]) -> None:
        """Take in what was noted since; `add` sums a tensor over the processes, in place."""
        together = torch.cat([part.flatten() for part in self._noted])
        add(together)
        parts = together.split([part.numel() for part in self._noted])
        for kept, part, noted in zip((self.scores, self.weights), parts, self._noted, strict=True):
            sums = part.view_as(kept)
            count = sums[:, :1]
            kept[:, :1] += count
            # The plain mean until the window is full, then one that forgets; exact where all numbers are equal.
            pull = (count / kept[:, :1].clamp(min=1, max=WINDOW)).clamp(max=1)
            kept[:, 1:] += pull * (sums[:, 1:] / count.clamp(min=1) - kept[:, 1:])
            noted.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved for an exact continuation."""
        return {"gates.scores": self.scores.clone(), "gates.weights": self.weights.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved `state_dict` back."""
        self.scores.copy_(state["gates.scores"])
        self.weights.copy_(state["gates.weights"])

    def _cells(self, teachers: Tensor, sigma: Tensor) -> Tensor:
        return teachers * QUARTERS + (sigma * QUARTERS).long().clamp(max=QUARTERS - 1)

    def _note(self, which: int, cells: Tensor, values: Tensor, sound: Tensor) -> None:
        noted = self._noted[which]
        values = values.double()
        sound = sound & torch.isfinite(values)
        values = torch.where(sound, values, torch.zeros_like(values))
        columns = [sound.double(), values, values.square()][: noted.shape[1]]
        # A product and no scattered sum: the same order of additions on every device, so that a run can be repeated.
        noted += one_hot(cells, len(noted)).double().T @ torch.stack(columns, dim=1)


def combine(parts: list[Tensor], usual: Tensor, conditional: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the row weights `parts` (B,), and the weight it makes: over the `usual`, at most `HIGHEST`.

    Rows that are not `conditional` (B,) bool weigh exactly 1.
    """
    product = torch.stack(parts).prod(0)
    weights = (product / usual).clamp(max=HIGHEST)
    return product, torch.where(conditional, weights, torch.ones_like(weights))


def summary(means: Mapping[str, float]) -> dict[str, float]:
    """Names for the log from the means of `METRICS` over an update's rows.

    `gate/weight` is the mean, `gate/weight std` the deviation, `gate/weight zero` the share that is 0, `gate/ess` the
    effective sample size over the number of rows, `(Σ w)² / (n Σ w²)`.
    """
    found = {f"gate/{name}": mean for name, mean in means.items() if name != "weight square"}
    if "weight" in means:
        weight, square = means["weight"], means["weight square"]
        found["gate/weight std"] = max(0.0, square - weight**2) ** 0.5
        found["gate/ess"] = weight**2 / square if square else 0.0
    return found
