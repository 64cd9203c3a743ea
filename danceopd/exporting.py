"""The end of a run: the averaged student is written, proven through the stock pipeline, and gets its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.base_model import load_base
from danceopd.card import load_snippet, write_card
from danceopd.formats import DTYPES
from danceopd.loop import STUDENT, Loop
from danceopd.lora import Adapter
from danceopd.processes import Processes
from danceopd.questions import alike
from danceopd.recipe import Recipe
from danceopd.run import RunFolder
from danceopd.samples import looking
from danceopd.student import Probe, export


@dataclass(frozen=True)
class Origin:
    """What a student was made from: the base's folder and fingerprint, its call, the teachers' hashes, and a sentence
    on where the student started."""

    base: Path
    fingerprint: str
    call: Mapping[str, Any]
    hashes: Mapping[str, str]
    start: str


def averaged(backbone: Backbone, average: Sequence[Tensor]) -> Adapter:
    """The student with averaged weights (A and B alternate, in the backbone's order)."""
    modules = backbone.modules(STUDENT)
    pairs = zip(average[::2], average[1::2], strict=True)
    return Adapter({m: (a.cpu().clone(), b.cpu().clone()) for m, (a, b) in zip(modules, pairs, strict=True)})


def stock(recipe: Recipe) -> torch.dtype | None:
    """What `load_base` is asked for: the stock default is fp32."""
    return None if recipe.dtype == "fp32" else DTYPES[recipe.dtype]


def write_student(
    student: Adapter,
    step: int,
    recipe: Recipe,
    loop: Loop,
    origin: Origin,
    run: RunFolder | None,
    processes: Processes,
    split: bool,
    gap: str | None = None,
    watched: Sequence[str] = (),
) -> None:
    """Write `student`, the average after `step`, into the run's folder; all processes ask, the first writes.

    `split`: each has its share of the base. `gap` and `watched` are what the card says of the run. ExportError when
    the written file is not the student.
    """
    backbone = loop.backbone
    field = looking(backbone, student, merged=False)
    proof = torch.device("cpu") if split else loop.device  # where the whole base fits
    probes = []
    for source in loop.sources:
        condition = source.questions.rows(alike(source.questions, 4)).to(loop.device)
        generator = torch.Generator().manual_seed(recipe.seed)
        x = torch.randn(len(condition), *condition.shape, generator=generator).to(loop.device)
        sigma = torch.linspace(1.0, 0.25, len(condition), device=loop.device)
        answer = field(x, sigma, condition)
        probes.append(Probe(x.to(proof), sigma.to(proof), condition.to(proof), answer.to(proof)))
    with processes.first():
        if run is None:
            return
        facts = {"steps": str(step), "seed": str(recipe.seed)}
        load = partial(load_base, origin.base, stock(recipe))
        export(student, run.path, recipe.base, probes, metadata=facts, load=load)
        # The student is trained without guidance; stock pipelines would add it unasked.
        call = {**origin.call, **backbone.family.unguided}
        grid = run.path / "samples" / f"step-{step:06d}.png"
        write_card(
            run.path,
            recipe,
            hashes={**origin.hashes, "base": origin.fingerprint, "student": student.sha256},
            snippet=load_snippet(str(recipe.resolved()["base"]), call),
            grid=grid if grid.exists() else None,
            start=origin.start,
            gap=gap,
            watched=watched,
        )
