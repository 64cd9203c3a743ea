"""The low-rank difference of two whole models: what a fine-tune learnt, as a LoRA, and what that loses.

Tensors are read one pair at a time, so no model is ever in memory. Each Linear's Δ = W_tuned − W_base is factored
by a seeded randomised SVD with power iterations (arXiv 0909.4061); the residual ‖Δ − BA‖ / ‖Δ‖ is measured on the
factors as they are written. What a LoRA cannot hold (norms, biases, embeddings, convolutions) is named with its
change, and counts in the total.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from danceopd.blend import Factors
from danceopd.checkpoint import Checkpoint, check_same, open_checkpoint
from danceopd.dialects import linear_sizes
from danceopd.errors import UserError
from danceopd.lora import Adapter, write_adapter
from danceopd.shipped import portable

OVERSAMPLING = 8
POWER_ITERATIONS = 2
Report = Callable[[int, int], None]
"""``report(numbers done, numbers in all)``"""


@dataclass(frozen=True)
class Change:
    """How one tensor changed. `rank` 0: it did not fit a LoRA, and its `residual` is 1."""

    name: str
    rank: int
    change: float  # ‖Δ‖ / ‖W_base‖; infinite where the base is zero
    residual: float  # ‖Δ − BA‖ / ‖Δ‖


@dataclass(frozen=True)
class Extraction:
    """A LoRA of the difference, and what every changed tensor lost. `residual` is over all of them together."""

    adapter: Adapter
    held: tuple[Change, ...]  # by module
    left: tuple[Change, ...]  # by tensor: changed, and not in the LoRA
    residual: float


def difference(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int = 64,
    energy: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    report: Report | None = None,
) -> Extraction:
    """The LoRA of at most `rank` closest to `tuned` − `base`, module by module.

    `energy` (0 to 1) gives each module the smallest rank that keeps this share of ‖Δ‖², `rank` at most. Factors are
    rounded through `dtype`. Work happens in fp32 on `device`, one tensor at a time.

    The adapter is empty when the two differ only where a LoRA cannot. Raises UserError when they are no match, are
    equal, or are not finite.
    """
    if rank < 1:
        raise UserError(f"the rank is {rank}; give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"the energy is {energy:g}; give the share of the change to keep, above 0 and up to 1")
    check_same(base, tuned)
    linears = linear_sizes((base if base.config is not None else tuned).empty())
    total, done = sum(_count(shape) for shape in base.shapes.values()), 0
    factors: dict[str, Factors] = {}
    held, left = [], []
    lost = whole = 0.0
    for name, shape in base.shapes.items():
        old = base.tensor(name).to(device, torch.float32)
        delta = tuned.tensor(name).to(device, torch.float32) - old
        size, before = float(delta.norm()), float(old.norm())
        if not isfinite(size):
            raise UserError(f"{name} of {tuned.path} or {base.path} holds NaN or infinity; use another checkpoint")
        change = size / before if before else float("inf")
        module = name.removesuffix(".weight")
        if size and module in linears and module != name:
            a, b = (half.to(dtype).float() for half in factor(delta, rank, energy, seed))
            gap = float(torch.addmm(delta, b, a, alpha=-1).norm())
            factors[module] = (a.cpu(), b.cpu())
            held.append(Change(module, a.shape[0], change, gap / size))
            lost += gap**2
        elif size:
            left.append(Change(name, 0, change, 1.0))
            lost += size**2
        whole += size**2
        done += _count(shape)
        if report is not None:
            report(done, total)
    if not whole:
        raise UserError(f"{tuned.path} equals {base.path} in every number, so there is nothing to extract")
    return Extraction(Adapter(factors), tuple(held), tuple(left), sqrt(lost / whole))


def factor(delta: Tensor, rank: int, energy: float | None = None, seed: int = 0) -> Factors:
    """A (r, in), B (out, r) with B·A close to the best approximation of `delta (out, in)`; r ≤ `rank`.

    Exact SVD where it is no dearer than the randomised one. The global random state is left alone.
    """
    probes = rank + OVERSAMPLING
    if 2 * probes >= min(delta.shape):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[delta.device] if delta.device.type == "cuda" else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(delta, q=probes, niter=POWER_ITERATIONS)
    keep = min(rank, len(s))
    if energy is not None:
        wanted = energy * float(delta.double().square().sum())
        reached = s.double().square().cumsum(0) >= wanted
        keep = min(keep, int(reached.int().argmax()) + 1 if bool(reached.any()) else keep)
    root = s[:keep].sqrt()
    return (root[:, None] * v[:, :keep].T).contiguous(), (u[:, :keep] * root).contiguous()


def extract(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    rank: int = 64,
    energy: float | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    report: Report | None = None,
) -> tuple[Path, Extraction]:
    """Write the difference of two whole models as a LoRA into `output`; returns the file and what was lost.

    Each model is a pipeline folder, a transformer folder, or a safetensors file (one of the two at least a folder).
    The file records its base. Raises UserError as `difference`, when a LoRA can hold
    none of it, and when `output` holds something already.
    """
    output = Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; name another one with --output")
    single = Path(base).expanduser().is_file()  # then the other model says what both are
    if single:
        tuned = open_checkpoint(finetuned)
        start = open_checkpoint(base, like=tuned)
    else:
        start = open_checkpoint(base)
        tuned = open_checkpoint(finetuned, like=start)
    found = difference(start, tuned, rank, energy, device_of(device), dtype, report=report)
    if not len(found.adapter):
        raise UserError(f"{tuned.path} differs from {start.path} only where a LoRA cannot; use it as a whole model")
    record = {"extracted_from": tuned.path.name, "tuned_sha256": tuned.sha256, "residual": f"{found.residual:.6f}"}
    record["base"] = portable(str(start.path)) if Path(base).exists() else str(base)
    if not single:
        record["base_sha256"] = start.sha256
    return write_adapter(found.adapter, output, dtype, record), found


def device_of(name: str) -> torch.device:
    """"auto", "cpu" or "cuda" as a device; UserError when there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, and this machine has no CUDA device that torch can use; give --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A report that draws a bar with the time left on a terminal's stderr, and a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    from danceopd.progress import PLAIN_EVERY, clock

    began = last = time.monotonic()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:  # its columns end with the time left
        task = bar.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if bar.disable and now - last >= PLAIN_EVERY:
                last, remaining = now, (now - began) / done * (total - done)
                print(f"{title} {done / total:.0%}  {clock(remaining)} left", file=sys.stderr, flush=True)

        yield report


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
