"""How far a rollout of few steps ends from one of many steps, by solver, at one forward of the model a step.

    python benchmarks/solvers.py [--prompts 32]

The shipped generation teacher samples validation prompts from the same noise with Euler, the two-step Adams-Bashforth
method of the rollouts and DPM-Solver++(2M) in flow form (arXiv 2211.01095: x0 = x - σ v, λ = log((1 - σ)/σ), first
order where λ is infinite). Root mean square distance of the clean latents from Euler's rollout of 128 steps. Writes
benchmarks/results/solvers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from danceopd.adapters.read import read_adapter
from danceopd.common.shipped import shipped
from danceopd.common.system import describe_machine
from danceopd.engine.rollout import rollout
from danceopd.engine.solvers import SOLVERS
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_folder, empty_transformer, load_base
from danceopd.models.fields import MergedField
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.worlds.scenes.prompts import prompts

RESULTS = Path(__file__).parent / "results" / "solvers.md"
STEPS, REFERENCE = (5, 8, 12, 16, 28), 128

Field = Callable[[Tensor, Tensor], Tensor]


def multistep(field: Field, x: Tensor, sigmas: Tensor) -> Tensor:
    """Clean latents by DPM-Solver++(2M) from noise `x (B, …)` down the schedule `sigmas (N+1,)`."""
    before: tuple[Tensor, float] | None = None  # the clean estimate before, and the λ at which it was made
    levels = sigmas.double().tolist()
    for s, t in zip(levels, levels[1:], strict=False):
        clean = x - s * field(x, torch.full((len(x),), s))
        here = math.log((1 - s) / s) if s < 1 else -math.inf
        there = math.log((1 - t) / t) if t > 0 else math.inf
        better = clean
        if before is not None and math.isfinite(before[1]) and math.isfinite(there):
            better = clean + (there - here) / (2 * (here - before[1])) * (clean - before[0])
        x = t / s * x + ((1 - t) - t / s * (1 - s)) * better
        before = clean, here
    return x


def main(
    count: Annotated[int, typer.Option("--prompts", min=1, help="Validation prompts.")] = 32,
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")] = RESULTS,
) -> None:
    """Sample with every solver and number of steps, and write the table."""
    torch.set_num_threads(1)
    folder = base_folder("base")
    pipe = load_base(folder)
    family = family_of(pipe)
    backbone = Backbone(pipe.transformer, family)
    backbone.add_adapter("teacher", read_adapter(shipped("generation"), empty_transformer(folder)))
    teacher = MergedField(backbone, "teacher")
    texts = [p.prompt for p in prompts("val", count)]

    def latents(steps: int, solver: str) -> Tensor:
        call = {"height": 64, "width": 64, "num_inference_steps": steps, "max_sequence_length": 32}
        pipeline = GenerationPipeline(pipe, family, call)
        condition, noise, sigmas = pipeline.conditions(texts), pipeline.noise(list(range(count))), pipeline.sigmas()
        if solver == "dpm":
            return multistep(lambda x, sigma: teacher(x, sigma, condition), noise, sigmas)
        ends = torch.full((count, 1), steps)
        return rollout(teacher, noise, sigmas, ends, condition, solver=SOLVERS[solver]())[:, 0]

    reference = latents(REFERENCE, "euler")
    lines = [
        f"`python benchmarks/solvers.py`: the shipped generation teacher, {count} prompts, {describe_machine()}. Root",
        f"mean square distance of the clean latents (deviation {reference.std():.2f}) from Euler's rollout of "
        f"{REFERENCE} steps.",
        "",
        "| steps | Euler | ab2 | DPM-Solver++(2M) in flow form |",
        "|--:|--:|--:|--:|",
    ]
    for steps in STEPS:
        errors = [float((latents(steps, name) - reference).square().mean().sqrt()) for name in ("euler", "ab2", "dpm")]
        lines.append(f"| {steps} | " + " | ".join(f"{error:.3f}" for error in errors) + " |")
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
