"""`extract`: a base and a fine-tuned model go in, a LoRA of their difference comes out, with what that loses.

Tensors are read one pair at a time, so no model is ever in memory. Each Linear's Δ = W_tuned − W_base is factored
by a seeded randomised SVD with power iterations (arXiv 0909.4061); the residual ‖Δ − BA‖ / ‖Δ‖ is measured on the
factors as they are written. What a LoRA cannot hold (norms, biases, embeddings, convolutions) is listed with its
change, and counts in the total residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import torch

from danceopd.adapters.dialects import linear_sizes
from danceopd.adapters.svd import Factors, low_rank_factors
from danceopd.adapters.write import write_adapter
from danceopd.common.shipped import portable
from danceopd.common.system import resolve_device
from danceopd.errors import UserError
from danceopd.models.checkpoint import Checkpoint, check_same, open_checkpoint
from danceopd.models.lora import Adapter


@dataclass(frozen=True)
class Change:
    """How one tensor changed. `rank` is 0, and `residual` 1, where a LoRA cannot hold the change."""

    name: str
    rank: int
    change: float  # ‖Δ‖ / ‖W_base‖; infinite where the base is zero
    residual: float  # ‖Δ − BA‖ / ‖Δ‖


@dataclass(frozen=True)
class Extraction:
    """A LoRA of the difference, and what every changed tensor lost; `residual` is over all of them together."""

    adapter: Adapter
    adapted: tuple[Change, ...]  # by module
    not_adapted: tuple[Change, ...]  # by tensor: changed, and not in the LoRA
    residual: float


def difference(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int = 64,
    energy: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    report: Callable[[int, int, str], None] | None = None,
) -> Extraction:
    """The LoRA of at most `rank` closest to `tuned` − `base`, module by module.

    `energy` (0 to 1) gives each module the smallest rank that keeps this share of ‖Δ‖², `rank` at most. Factors are
    rounded to `dtype`. Computed in fp32 on `device`, one tensor at a time; `report(done, total, note)` is called after
    each. The adapter is empty when the two differ only where a LoRA cannot.

    UserError when the models do not match, are equal, or are not finite.
    """
    if rank < 1:
        raise UserError(f"the rank is {rank}; give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"the energy is {energy:g}; give the share of the change to keep, above 0 and up to 1")
    check_same(base, tuned)
    linears = linear_sizes((base if base.config is not None else tuned).empty())
    total, done = sum(_count(shape) for shape in base.shapes.values()), 0
    factors: dict[str, Factors] = {}
    adapted, not_adapted = [], []
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
            a, b = (half.to(dtype).float() for half in low_rank_factors(delta, rank, energy, seed))
            gap = float(torch.addmm(delta, b, a, alpha=-1).norm())
            factors[module] = (a.cpu(), b.cpu())
            adapted.append(Change(module, a.shape[0], change, gap / size))
            lost += gap**2
        elif size:
            not_adapted.append(Change(name, 0, change, 1.0))
            lost += size**2
        whole += size**2
        done += _count(shape)
        if report is not None:
            report(done, total, "weights")
    if not whole:
        raise UserError(f"{tuned.path} equals {base.path} in every number, so there is nothing to extract")
    return Extraction(Adapter(factors), tuple(adapted), tuple(not_adapted), sqrt(lost / whole))


def extract(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    rank: int = 64,
    energy: float | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    report: Callable[[int, int, str], None] | None = None,
) -> tuple[Path, Extraction]:
    """Write the difference of two whole models as a LoRA into `output`; returns the file and what was lost.

    Each model is a pipeline folder, a transformer folder, or a safetensors file (at least one of the two a folder).
    The LoRA's metadata names its base. UserError as `difference`, when a LoRA can hold none of the difference, and when
    `output` is not empty.
    """
    output = Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; name another one with --output")
    single = Path(base).expanduser().is_file()  # then the other model says the architecture
    if single:
        tuned = open_checkpoint(finetuned)
        start = open_checkpoint(base, like=tuned)
    else:
        start = open_checkpoint(base)
        tuned = open_checkpoint(finetuned, like=start)
    found = difference(start, tuned, rank, energy, resolve_device(device), dtype, report=report)
    if not len(found.adapter):
        raise UserError(f"{tuned.path} differs from {start.path} only where a LoRA cannot; use it as a whole model")
    record = {"extracted_from": tuned.path.name, "tuned_sha256": tuned.sha256, "residual": f"{found.residual:.6f}"}
    record["base"] = portable(str(start.path)) if Path(base).exists() else str(base)
    if not single:
        record["base_sha256"] = start.sha256
    return write_adapter(found.adapter, output, dtype, record), found


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
