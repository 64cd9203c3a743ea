"""Metrics of an update: losses by teacher, velocity errors and queries by noise level, summed over the processes.

Each process adds its own rows to one vector of sums and counts (`MetricSums`); the vectors are summed over the
processes, and the means are taken of the whole (`StepMetrics`). Nothing is read back from the device before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from danceopd.engine.batches import Batch
from danceopd.engine.objectives import RowLoss

ERROR_BINS, QUERY_BINS = 4, 10
"""Equal bins of the noise level in which errors are reported, and in which queries are counted."""


@dataclass
class StepMetrics:
    """What update `step` did: loss overall and by teacher, mean query level, gradient norm, learning rate.

    `errors` are the mean squared velocity errors in `ERROR_BINS` bins of the noise level from 0 to 1, by bin; one
    without a query has none. `queries` is the share of the queries in each of `QUERY_BINS` bins. `loss_scale` is what
    the loss was multiplied by on its way through an fp16 backbone. `extra` are figures of hooks and callbacks, by name.
    """

    step: int
    loss: float = 0.0
    loss_by_teacher: dict[str, float] = field(default_factory=dict)
    query_sigma: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    skipped: bool = False
    errors: dict[int, float] = field(default_factory=dict)
    queries: list[float] = field(default_factory=list)
    loss_scale: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def scalars(self) -> dict[str, Any]:
        """Flat names for the log."""
        teachers = {f"loss/{name}": value for name, value in self.loss_by_teacher.items()}
        errors = {f"error/sigma {i / ERROR_BINS:g}-{(i + 1) / ERROR_BINS:g}": e for i, e in self.errors.items()}
        queries = {f"query/sigma {i / QUERY_BINS:g}-{(i + 1) / QUERY_BINS:g}": q for i, q in enumerate(self.queries)}
        rest = {"query_sigma": self.query_sigma, "grad_norm": self.grad_norm, "lr": self.lr}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        return {"loss": self.loss, **teachers, **errors, **queries, **rest, **scale, **self.extra}


class MetricSums:
    """Sums over the rows of an update, for `teachers` by name, and of the row metrics `names` that a hook adds."""

    def __init__(self, teachers: Sequence[str], device: torch.device, names: Sequence[str] = ()) -> None:
        self.teachers, self.device, self.names = list(teachers), device, list(names)
        self._teacher_index: list[int] = []
        self._losses: list[Tensor] = []
        self._queries: list[RowLoss] = []

    def add(self, batch: Batch, queries: Sequence[RowLoss]) -> None:
        """Count a batch's rows; `queries` are all its row losses, detached."""
        self._teacher_index += batch.teacher_index
        self._losses.append(torch.stack([one.loss for one in queries]).sum(0))
        self._queries += queries

    def mean(self, metrics: StepMetrics, all_reduce: Callable[[Tensor], None]) -> dict[str, float]:
        """Write the means over all processes into `metrics`; returns those of the hook's row metrics, by name.

        `all_reduce` sums a vector over the processes, in place.
        """
        teachers, names = len(self.teachers), len(self.names)
        total = torch.zeros(2 * teachers + 2 * ERROR_BINS + QUERY_BINS + 1 + 2 * names, dtype=torch.float64)
        losses, rows, errors, placed, queries, sigmas, sums, counts = total.split(
            [teachers, teachers, ERROR_BINS, ERROR_BINS, QUERY_BINS, 1, names, names]
        )
        if self._queries:
            index, sigma = torch.tensor(self._teacher_index), torch.cat([one.sigma for one in self._queries]).cpu()
            losses.index_add_(0, index, torch.cat(self._losses).cpu().double())
            rows += torch.bincount(index, minlength=teachers)
            bins = (sigma * ERROR_BINS).long().clamp(max=ERROR_BINS - 1)
            errors.index_add_(0, bins, torch.cat([one.error for one in self._queries]).cpu().double())
            placed += torch.bincount(bins, minlength=ERROR_BINS)
            queries += torch.bincount((sigma * QUERY_BINS).long().clamp(max=QUERY_BINS - 1), minlength=QUERY_BINS)
            sigmas += sigma.double().sum()
            for i, name in enumerate(self.names):
                found = [one.metrics[name] for one in self._queries if name in one.metrics]
                values = torch.cat(found or [total[:0]]).cpu().double()
                values = values[~values.isnan()]  # a metric means nothing for such a row
                sums[i], counts[i] = values.sum(), len(values)
        there = total.to(self.device)
        all_reduce(there)
        total.copy_(there)
        metrics.loss = float(losses.sum() / rows.sum())
        metrics.loss_by_teacher = {name: float(losses[m] / rows[m]) for m, name in enumerate(self.teachers) if rows[m]}
        metrics.errors = {i: float(errors[i] / placed[i]) for i in range(ERROR_BINS) if placed[i]}
        metrics.queries = (queries / queries.sum()).tolist()
        metrics.query_sigma = float(sigmas / queries.sum())
        return {name: float(sums[i] / counts[i]) for i, name in enumerate(self.names) if counts[i]}


@torch.no_grad()
def adapter_norm(parameters: Sequence[Tensor]) -> float:
    """Frobenius norm of all that an adapter adds, `√Σ |B A|²`; A (r, in) and B (out, r) alternate.

    `|B A|² = <Bᵀ B, A Aᵀ>`, so nothing larger than r x r is made.
    """
    parts = [((b.T @ b) * (a @ a.T)).sum() for a, b in zip(parameters[::2], parameters[1::2], strict=True)]
    return float(torch.stack(parts).double().sum().clamp(min=0).sqrt())
