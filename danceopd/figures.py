"""The figures of an update: losses by teacher, errors and queries by noise level, summed over the processes.

Each process counts its own rows into one vector of sums and counts (`Figures`); the vectors add up, and the means
are taken of the whole (`Progress`). Nothing is read back from the device before that.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danceopd.gates import FIGURES, summary
from danceopd.lesson import Told

BINS, FINE = 4, 10
"""Equal bins of the noise level in which errors are reported, and in which queries are counted."""


@dataclass
class Progress:
    """What one update did: loss overall and by teacher, mean query level, gradient norm, learning rate.

    `errors` are the mean squared velocity errors in `BINS` bins of the noise level from 0 to 1, by bin; one without a
    query has none. `asked` is the histogram of the queries: the share of each of `FINE` bins. `scale` is what the
    loss was multiplied by on its way through an fp16 backbone. `gates` is what the gates report, by name (`gates.py`).
    """

    step: int
    loss: float = 0.0
    by_teacher: dict[str, float] = field(default_factory=dict)
    sigma: float = 0.0
    gradient: float = 0.0
    rate: float = 0.0
    skipped: bool = False
    errors: dict[int, float] = field(default_factory=dict)
    asked: list[float] = field(default_factory=list)
    scale: float | None = None
    gates: dict[str, float] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Flat names for the log."""
        named = {f"loss/{name}": value for name, value in self.by_teacher.items()}
        levels = {f"error/sigma {i / BINS:g}-{(i + 1) / BINS:g}": value for i, value in self.errors.items()}
        asked = {f"asked/sigma {i / FINE:g}-{(i + 1) / FINE:g}": value for i, value in enumerate(self.asked)}
        rest = {"sigma": self.sigma, "gradient": self.gradient, "rate": self.rate}
        scale = {} if self.scale is None else {"loss scale": self.scale}
        return {"loss": self.loss, **named, **levels, **asked, **rest, **scale, **self.gates}


class Figures:
    """Sums over the rows of an update, for `teachers` by name; what gates say is summed where rows are `gated`."""

    def __init__(self, teachers: Sequence[str], device: torch.device, gated: bool = False) -> None:
        self.teachers, self.device, self.gated = list(teachers), device, gated
        self._losses: list[Tensor] = []
        self._routes: list[int] = []
        self._sigmas: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._gates: list[Mapping[str, Tensor]] = []

    def count(self, routes: Sequence[int], told: Sequence[Told]) -> None:
        """Add what a lesson told its rows, whose teachers are `routes`."""
        self._routes += routes
        self._losses.append(torch.stack([one.loss for one in told]).sum(0))
        self._sigmas += [one.sigma for one in told]
        self._errors += [one.error for one in told]
        self._gates += [one.gate for one in told]

    def into(self, done: Progress, add: Callable[[Tensor], None]) -> None:
        """Write the means into `done`; `add` sums a vector over the processes, in place."""
        teachers = len(self.teachers)
        gates = len(FIGURES) if self.gated else 0
        sizes = [teachers, teachers, BINS, BINS, FINE, 1, gates, gates, 2 if gates else 0]
        total = torch.zeros(sum(sizes), dtype=torch.float64)
        losses, rows, errors, places, fine, sigmas, said, counts, weights = total.split(sizes)
        if self._routes:
            routes, sigma = torch.tensor(self._routes), torch.cat(self._sigmas).cpu()
            losses.index_add_(0, routes, torch.cat(self._losses).cpu().double())
            rows += torch.bincount(routes, minlength=teachers)
            bins = (sigma * BINS).long().clamp(max=BINS - 1)
            errors.index_add_(0, bins, torch.cat(self._errors).cpu().double())
            places += torch.bincount(bins, minlength=BINS)
            fine += torch.bincount((sigma * FINE).long().clamp(max=FINE - 1), minlength=FINE)
            sigmas += sigma.double().sum()
            for i, name in enumerate(FIGURES[:gates]):
                values = torch.cat([one[name] for one in self._gates if name in one] or [total[:0]]).cpu().double()
                values = values[~values.isnan()]
                said[i], counts[i] = values.sum(), len(values)
                if name == "weight":
                    weights[0], weights[1] = values.square().sum(), (values <= 0).sum()
        there = total.to(self.device)
        add(there)
        total.copy_(there)
        done.loss = float(losses.sum() / rows.sum())
        done.by_teacher = {name: float(losses[m] / rows[m]) for m, name in enumerate(self.teachers) if rows[m]}
        done.errors = {i: float(errors[i] / places[i]) for i in range(BINS) if places[i]}
        done.asked = (fine / fine.sum()).tolist()
        done.sigma = float(sigmas / fine.sum())
        done.gates = summary(said, counts, *weights.tolist()) if gates else {}


class Pace:
    """The student's size and what a run takes: adapter norm, rows a second, peak memory.

    `rows` are those of an update. Between `start` and `figures` nothing but an update happens, so checks, pictures and
    checkpoints do not count.
    """

    def __init__(self, parameters: Sequence[Tensor], rows: int, device: torch.device) -> None:
        self.parameters, self.rows, self.device = list(parameters), rows, device
        self._began = time.monotonic()

    def start(self) -> None:
        """An update begins."""
        self._began = time.monotonic()

    def figures(self) -> dict[str, float]:
        """For the log: `adapter` (see `adapter_norm`), `samples/s`, `memory` in bytes."""
        speed = self.rows / max(time.monotonic() - self._began, 1e-9)
        norm = adapter_norm(self.parameters)
        return {"adapter": norm, "samples/s": speed, "memory": float(peak_memory(self.device))}


@torch.no_grad()
def adapter_norm(parameters: Sequence[Tensor]) -> float:
    """Frobenius norm of all that an adapter adds, `√Σ |B A|²`; A (r, in) and B (out, r) alternate.

    `|B A|² = <Bᵀ B, A Aᵀ>`, so nothing larger than r x r is made.
    """
    parts = [((b.T @ b) * (a @ a.T)).sum() for a, b in zip(parameters[::2], parameters[1::2], strict=True)]
    return float(torch.stack(parts).double().sum().clamp(min=0).sqrt())


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process(os.getpid()).memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
