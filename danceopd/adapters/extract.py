"""`extract`: a base and a fine-tuned model go in, a LoRA of their difference comes out, with what that loses.

Instead of a fine-tuned model, a LoRA, DoRA, LoKr or LoHa of the base may be given: a DoRA cannot be read without the
base's weights, and the others may be wanted at a smaller rank. Tensors are read one pair at a time, so no model is ever
in memory. Each Linear's Δ = W_tuned − W_base is factored by a seeded randomised SVD with power iterations (arXiv
0909.4061); the residual ‖Δ − BA‖ / ‖Δ‖ is measured on the factors as they are written. What a LoRA cannot hold (norms,
biases, embeddings, convolutions) is listed with its change, and counts in the total residual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from danceopd.adapters.dialects import linear_sizes
from danceopd.adapters.header import inspect_adapter, is_checkpoint
from danceopd.adapters.read import read_dora
from danceopd.adapters.svd import Factors, low_rank_factors
from danceopd.adapters.write import write_adapter
from danceopd.common.shipped import portable, resolve
from danceopd.common.system import resolve_device
from danceopd.errors import UserError
from danceopd.models.base import file_sha256
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


class AdaptedBase:
    """A base with an adapter of it: what its Linears change by. `path` and `sha256` are the adapter's."""

    def __init__(self, path: str | Path, base: Checkpoint, drop: Collection[str] = ()) -> None:
        """`drop` as for `read_adapter`; UserError when the adapter is not one of this base."""
        header = inspect_adapter(path)
        self.path, trained_on = header.file, header.record.get("base_sha256")
        if trained_on and trained_on != base.sha256:
            raise UserError(
                f"{self.path} was trained on another base than {base.path} (their fingerprints differ); give the base "
                "it was trained on"
            )
        self.sha256 = file_sha256(self.path)
        self.adapter, self.magnitudes = read_dora(self.path, base.empty(), drop)

    def change(self, module: str, old: Tensor) -> Tensor:
        """W' − W of a module, where W is `old (out, in)`: B·A, or for a DoRA m (W + B·A) / ‖W + B·A‖ − W.

        The norm is of each row, or of each column where m is (1, in) (arXiv 2402.09353).
        """
        if module not in self.adapter.tensors:
            return torch.zeros_like(old)
        delta = self.adapter.delta(module).to(old)
        if module not in self.magnitudes:
            return delta
        magnitude = self.magnitudes[module].to(old)
        new = old + delta
        return magnitude / new.norm(dim=0 if magnitude.shape[0] == 1 else 1, keepdim=True) * new - old


def difference(
    base: Checkpoint,
    tuned: Checkpoint | AdaptedBase,
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
    if isinstance(tuned, Checkpoint):
        check_same(base, tuned)
    linears = linear_sizes((tuned if base.config is None and isinstance(tuned, Checkpoint) else base).empty())
    total, done = sum(_count(shape) for shape in base.shapes.values()), 0
    factors: dict[str, Factors] = {}
    adapted, not_adapted = [], []
    lost = whole = 0.0
    for name, shape in base.shapes.items():
        old, module = base.tensor(name).to(device, torch.float32), name.removesuffix(".weight")
        if isinstance(tuned, AdaptedBase):
            delta = tuned.change(module, old)
        else:
            delta = tuned.tensor(name).to(device, torch.float32) - old
        size, before = float(delta.norm()), float(old.norm())
        if not isfinite(size):
            raise UserError(f"{name} of {tuned.path} or {base.path} holds NaN or infinity; use another checkpoint")
        change = size / before if before else float("inf")
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
        raise UserError(f"{tuned.path} equals {base.path} in every number: nothing to extract; give a trained model")
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
    drop: Collection[str] = (),
) -> tuple[Path, Extraction]:
    """Write the difference of two whole models as a LoRA into `output`; returns the file and what was lost.

    Each model is a pipeline folder, a transformer folder, or a safetensors file (at least one of the two a folder);
    `finetuned` may be an adapter of the base (`drop` as for `read_adapter`). The LoRA's metadata names its base.
    UserError as `difference`, when a LoRA can hold none of the difference, and when `output` is not empty.
    """
    output = Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; name another one with --output")
    single = Path(base).expanduser().is_file()  # then the other model says the architecture
    place = Path(resolve(str(finetuned), "model", hub=True)).expanduser()
    tuned: Checkpoint | AdaptedBase
    if (place.is_file() or any(place.glob("*.safetensors"))) and not is_checkpoint(place):
        if single:
            raise UserError(f"{base} is a single file and {finetuned} an adapter; give the base's folder")
        start = open_checkpoint(base)
        tuned = AdaptedBase(place, start, drop)
    elif single:
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
    return write_adapter(found.adapter, output, dtype, record, one_rank=energy is None), found


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
