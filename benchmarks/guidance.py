"""Absorbed guidance: students of guided teachers, sampled with and without guidance of their own.

    python benchmarks/guidance.py [--updates 200]

The shipped generation teacher is asked with classifier-free guidance of several scales (`guidance` of a teacher), and a
student that starts as the plain teacher learns its answers, with and without rows of the null prompt
(`guidance.unconditional`). Each student, and the teacher itself, is then sampled at several scales: the share of right
pictures on validation prompts, and the distance of its pictures from those of the teacher at the scale that it learnt
(root mean square, of 255). Guidance that compounds shows as a distance that grows with the sampling scale. Writes
benchmarks/results/guidance.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from quality import RESULTS, Judge
from rich.console import Console

from danceopd.base_model import base_folder, empty_transformer
from danceopd.fields import GuidedField
from danceopd.lora import Adapter, read_adapter
from danceopd.machine import describe
from danceopd.merge import merge
from danceopd.recipe import Recipe
from danceopd.shipped import shipped
from danceopd.teachers import null_prompt

SCALES = (1.0, 2.0, 3.5)
HEAD = """`python benchmarks/guidance.py --updates {updates}`: {items} validation prompts, {machine}, torch {torch}.
Share of right pictures, and in brackets the root mean square distance (of 255) from what the teacher draws at the
scale that the student learnt. `null` is the share of rows asked with the null prompt.

| learnt scale | null | {scales} |
|---|---|{rule}"""


def student(scale: float, unconditional: float, updates: int) -> Adapter:
    """What learns the generation teacher's answers at a scale, from the plain teacher on."""
    with tempfile.TemporaryDirectory() as folder:
        fields: dict[str, Any] = {
            "teachers": [  # one teacher is no merge: it stands there twice
                {"name": name, "adapter": "generation", "capability": "generation", "guidance": scale}
                for name in ("generation", "again")
            ],
            "output": Path(folder) / "run", "steps": updates, "batch": 32, "ema": 0.98,
            "student": {"rank": 80, "init": "generation"}, "rollout": {"steps": 8}, "query": {"law": "uniform"},
            "guidance": {"unconditional": unconditional},
            "optimizer": {"lr": 1e-3, "warmup": 10, "schedule": "cosine"},
            "data": {"rows": 4096}, "gap": {"every": 0}, "samples": {"every": 0, "count": 1},
            "save_every": updates, "keep_last": 1,
        }  # fmt: skip
        merge(Recipe(**fields), lambda *_: None)
        return read_adapter(Path(folder) / "run")


def main(
    updates: Annotated[int, typer.Option(min=1)] = 200,
    items: Annotated[int, typer.Option(min=6)] = 240,
) -> None:
    """Learn the students, sample everybody at every scale, and write the table."""
    torch.set_num_threads(1)
    judge, console = Judge(base_folder("base"), items), Console()
    null = null_prompt(judge.work[0][0], "generation")

    def pictures(adapter: Adapter) -> list[Any]:
        with judge.acting(adapter) as field:
            return [judge.drawn(0, field if s == 1 else GuidedField(field, null, s)) for s in SCALES]

    teacher = read_adapter(shipped("generation"), empty_transformer(base_folder("base")))
    own = pictures(teacher)
    rows = [("the teacher itself", "", own, None)]
    for learnt, goal in zip(SCALES[1:], own[1:]):
        for unconditional in (0.0, 0.2):
            began = time.monotonic()
            drawn = pictures(student(learnt, unconditional, updates))
            rows.append((f"{learnt:g}", f"{unconditional:g}", drawn, goal))
            console.print(learnt, unconditional, f"{time.monotonic() - began:.0f} s")
    lines = [HEAD.format(
        updates=updates, items=items, machine=describe(), torch=torch.__version__,
        scales=" | ".join(f"sampled at {s:g}" for s in SCALES), rule="--:|" * len(SCALES),
    )]  # fmt: skip
    for learnt, share, drawn, goal in rows:
        cells = []
        for found in drawn:
            right = judge.suite.summarise(judge.scores(0, found))["generation"]["overall"]["mean"]
            cells.append(f"{right:.3f}" + ("" if goal is None else f" ({_apart(found, goal):.1f})"))
        lines.append(f"| {learnt} | {share} | {' | '.join(cells)} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "guidance.md").write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines), highlight=False)


def _apart(pictures: Any, others: Any) -> float:
    a, b = (np.stack([np.asarray(p, np.float64) for p in some]) for some in (pictures, others))
    return float(np.sqrt(np.square(a - b).mean()))


if __name__ == "__main__":
    typer.run(main)
