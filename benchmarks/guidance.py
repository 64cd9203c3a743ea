"""Students of teachers with classifier-free guidance (CFG), sampled with and without CFG of their own.

    python benchmarks/guidance.py [--updates 200]

The shipped generation teacher is queried with CFG of several scales (`guidance` of a teacher), and a student that
starts as the plain teacher learns its velocities, with and without unconditional rows (`guidance.unconditional`). Each
student, and the teacher itself, is then sampled at several scales: the share of correct pictures on validation prompts,
and the distance of its pictures from those of the teacher at the scale that was learnt (root mean square, of 255). CFG
on top of learnt CFG shows as a distance that grows with the sampling scale. Writes benchmarks/results/guidance.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from quality import RESULTS, ImageEvaluator
from rich.console import Console

from danceopd.adapters.read import read_adapter
from danceopd.common.shipped import shipped
from danceopd.common.system import describe_machine
from danceopd.data.null_prompt import null_prompt
from danceopd.merge import merge
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.fields import GuidedField
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe

SCALES = (1.0, 2.0, 3.5)
HEAD = """`python benchmarks/guidance.py --updates {updates}`: {items} validation prompts, {machine}, torch {torch}.
Share of correct pictures, and in brackets the root mean square distance (of 255) from the teacher's pictures at the
scale that the student learnt. `unconditional` is the share of training rows with the null prompt.

| learnt scale | unconditional | {scales} |
|---|---|{rule}"""


def student(scale: float, unconditional: float, updates: int) -> Adapter:
    """A student that starts as the plain generation teacher and learns its velocities at a CFG scale."""
    with tempfile.TemporaryDirectory() as folder:
        fields: dict[str, Any] = {
            "teachers": [  # one teacher is no merge, so it is given twice
                {"name": name, "adapter": "generation", "capability": "generation", "guidance": scale}
                for name in ("generation", "again")
            ],
            "output": Path(folder) / "run", "steps": updates, "batch": 32, "ema": 0.98,
            "student": {"rank": 80, "init": "generation"}, "rollout": {"steps": 8}, "query": {"law": "uniform"},
            "guidance": {"unconditional": unconditional},
            "optimizer": {"lr": 1e-3, "warmup": 10, "schedule": "cosine"},
            "data": {"rows": 4096}, "validation": {"every": 0}, "samples": {"every": 0, "count": 1},
            "save_every": updates, "keep_last": 1,
        }  # fmt: skip
        merge(Recipe(**fields), lambda *_: None)
        return read_adapter(Path(folder) / "run")


def main(
    updates: Annotated[int, typer.Option(min=1, help="Optimizer steps of each student.")] = 200,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts.")] = 240,
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")] = RESULTS / "guidance.md",
) -> None:
    """Train the students, sample them and the teacher at every scale, and write the table."""
    torch.set_num_threads(1)
    evaluate, console = ImageEvaluator(base_folder("base"), items), Console()
    null = null_prompt(evaluate.tasks[0][0], "generation")

    def images(adapter: Adapter) -> list[Any]:
        with evaluate.merged(adapter) as field:
            return [evaluate.images(0, field if s == 1 else GuidedField(field, null, s)) for s in SCALES]

    teacher = images(read_adapter(shipped("generation"), empty_transformer(base_folder("base"))))
    rows = [("the teacher itself", "", teacher, None)]
    for learnt, target in zip(SCALES[1:], teacher[1:]):
        for unconditional in (0.0, 0.2):
            began = time.monotonic()
            sampled = images(student(learnt, unconditional, updates))
            rows.append((f"{learnt:g}", f"{unconditional:g}", sampled, target))
            console.print(learnt, unconditional, f"{time.monotonic() - began:.0f} s")
    lines = [HEAD.format(
        updates=updates, items=items, machine=describe_machine(), torch=torch.__version__,
        scales=" | ".join(f"sampled at {s:g}" for s in SCALES), rule="--:|" * len(SCALES),
    )]  # fmt: skip
    for learnt, share, sampled, target in rows:
        cells = []
        for found in sampled:
            correct = evaluate.suite.summarise(evaluate.scores(0, found))["generation"]["overall"]["mean"]
            cells.append(f"{correct:.3f}" + ("" if target is None else f" ({_rms_distance(found, target):.1f})"))
        lines.append(f"| {learnt} | {share} | {' | '.join(cells)} |")
    output.parent.mkdir(exist_ok=True)
    output.write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines), highlight=False)


def _rms_distance(images: Any, others: Any) -> float:
    a, b = (np.stack([np.asarray(image, np.float64) for image in some]) for some in (images, others))
    return float(np.sqrt(np.square(a - b).mean()))


if __name__ == "__main__":
    typer.run(main)
