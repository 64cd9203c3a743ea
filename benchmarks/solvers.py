"""How far a walk of few steps ends from a walk of many, by solver, at one call of the model a step.

    python benchmarks/solvers.py

The shipped generation teacher draws 32 validation prompts from the same noise with Euler, the two-step Adams-Bashforth
method of the rollouts and DPM-Solver++(2M) in flow form (arXiv 2211.01095: x0 = x - σ v, λ = log((1 - σ)/σ), first
order where λ is infinite). Root mean square distance of the clean latents from Euler's walk of 128 steps. Writes
benchmarks/results/solvers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from danceopd.backbone import Backbone
from danceopd.base_model import base_folder, empty_transformer, load_base
from danceopd.fields import MergedField
from danceopd.lora import read_adapter
from danceopd.machine import describe
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.rollout import rollout
from danceopd.scenes.prompts import prompts
from danceopd.shipped import shipped
from danceopd.solvers import SOLVERS

RESULTS = Path(__file__).parent / "results" / "solvers.md"
STEPS, FINE, COUNT = (5, 8, 12, 16, 28), 128, 32

Field = Callable[[Tensor, Tensor], Tensor]


def multistep(field: Field, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) along the schedule."""
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


def main() -> None:
    torch.set_num_threads(1)
    folder = base_folder("base")
    pipe = load_base(folder)
    family = family_of(pipe)
    backbone = Backbone(pipe.transformer, family)
    backbone.add_adapter("teacher", read_adapter(shipped("generation"), empty_transformer(folder)))
    teacher = MergedField(backbone, "teacher")
    words = [p.prompt for p in prompts("val", COUNT)]

    def drawn(steps: int, solver: str) -> Tensor:
        draw = GenerationPipeline(pipe, family, {"height": 64, "width": 64, "steps": steps, "max_sequence_length": 32})
        condition, noise, sigmas = draw.conditions(words), draw.noise(list(range(COUNT))), draw.sigmas()
        if solver == "dpm":
            return multistep(lambda x, sigma: teacher(x, sigma, condition), noise, sigmas)
        ends = torch.full((COUNT, 1), steps)
        return rollout(teacher, noise, sigmas, ends, condition, solver=SOLVERS[solver]())[:, 0]

    truth = drawn(FINE, "euler")
    lines = [
        f"`python benchmarks/solvers.py`: the shipped generation teacher, {COUNT} prompts, {describe()}. Root mean",
        f"square distance of the clean latents (deviation {truth.std():.2f}) from Euler's walk of {FINE} steps.",
        "",
        "| steps | Euler | ab2 | DPM-Solver++(2M) in flow form |",
        "|--:|--:|--:|--:|",
    ]
    for steps in STEPS:
        far = [float((drawn(steps, name) - truth).square().mean().sqrt()) for name in ("euler", "ab2", "dpm")]
        lines.append(f"| {steps} | " + " | ".join(f"{value:.3f}" for value in far) + " |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
