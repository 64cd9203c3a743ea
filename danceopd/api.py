"""`danceopd.blend` for Python: several LoRAs of one base go in, one LoRA file comes out, as by `danceopd blend`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.bench.results import Benched, BenchResult
from danceopd.errors import UserError

if TYPE_CHECKING:
    from danceopd.adapters.blending.methods import Method


@dataclass(frozen=True)
class Blend(Benched):
    """A blended LoRA: its `folder` and `file`, and what its rank lost, ‖Δ − BA‖ / ‖Δ‖ (Frobenius, 0 is exact).

    `residuals` has it by layer. `blended.bench(...)` scores it; then it has `scores`, `report` and `grid`.
    """

    folder: Path
    file: Path
    residual: float
    residuals: dict[str, float]

    def bench(self, suite: str = "scenes", **options: Any) -> BenchResult:
        """Score it against its base, or `against` others, on a suite; see `danceopd.bench` for the options."""
        return super().bench(suite, **{"against": ["base"], **options})

    def pipeline(self, **how: Any) -> Any:
        """The stock diffusers pipeline with the LoRA in it (see `load_student`)."""
        from danceopd.adapters.load import load_student

        return load_student(self.folder, **how)


def blend(
    loras: Sequence[str | os.PathLike],
    weights: Sequence[float] | None = None,
    output: str | os.PathLike = "blend",
    method: str | Method = "linear",
    rank: int | None = None,
    base: str | os.PathLike | None = None,
    **options: Any,
) -> Blend:
    """Blend LoRAs of one base in weight space, in seconds, most methods without data; write the result into `output`.

    `loras` are files, folders or shipped names. A layer's delta is B @ A, (out, in); what is blended are the deltas, so
    the ranks may differ. `weights` has one number for each LoRA, None for the method's own (1/N for linear). `method`
    is one of `danceopd blend --help`, a plug-in's name, or a `Method`. `rank` is that of the written layers, None for
    the sum of the LoRAs' ranks, which is exact for linear methods. `base` is the model that they belong to, by default
    the one that the files name. `options` are further fields of the command: `density`, `scale`, `seed`, `drop`,
    `space`, `dtype`; for methods that look at inputs `data` (a list), `prompts` and `device`.

    Raises UserError when the LoRAs belong to different bases or the blend changes nothing, and when `output` holds a
    LoRA already: nothing is overwritten.
    """
    from danceopd.cli.blend import Asked, Request, run

    if isinstance(loras, str | os.PathLike):
        raise UserError(f"blend got {os.fspath(loras)!r}; give a list of LoRAs, as blend(['a', 'b'], [0.7, 0.9])")
    data = options.pop("data", ())
    data = [data] if isinstance(data, str | os.PathLike) else data
    asked = Asked([os.fspath(one) for one in data], options.pop("prompts", None), options.pop("device", None))
    known = [name for name in Request.__dataclass_fields__ if name not in ("asked", "layers")][2:]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"blend has no option {unknown[0]!r}; it has {', '.join([*known, 'data, prompts, device'])}")
    file, found = run(Request(list(loras), output, method, weights, rank, base=base, asked=asked, **options))
    return Blend(file.parent, file, found.residual, found.residuals)
