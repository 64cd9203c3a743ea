"""What a contrast makes of the teachers themselves: they are sampled with it, and nothing is trained.

    python benchmarks/contrast.py                        # the shipped teachers, 768 validation prompts and edits

Each line is `v + w (v - v_ref)` for one reference and weight (recipe key `contrast`), integrated as the suite does, and
compared with the plain teacher item by item from the same noise: the ceiling of what a student can learn from that
target. Intervals (95 %) resample items within categories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from past import Scored, TestEvaluator, difference, overall
from quality import CAPABILITIES
from rich.console import Console

from danceopd.adapters.read import read_adapter
from danceopd.common.shipped import shipped
from danceopd.common.system import describe_machine
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.fields import AdapterField, BaseField, ContrastField, VelocityField

RESULTS = Path(__file__).parent / "results"
STRENGTHS = (0.25, 0.5, 0.75)
LINES = (
    "plain;base 0.5;base 1;other 0.3;other 1;weaker0.5 1;weaker0.5 2;weaker0.5 3;weaker0.25 1;weaker0.75 2;weaker0.75 4"
)
"""`REFERENCE WEIGHT`: the base, the other teacher, or the teacher itself at a strength."""


class Teachers:
    """Both teachers, and each of them at lower strengths, on the evaluator's backbone."""

    def __init__(self, evaluate: TestEvaluator, base: Path) -> None:
        self.backbone = evaluate.backbone
        for name in CAPABILITIES:
            adapter = read_adapter(shipped(name), empty_transformer(base))
            self.backbone.add_adapter(name, adapter)
            for strength in STRENGTHS:
                self.backbone.add_adapter(f"{name}-{int(100 * strength)}", adapter, strength)

    def field(self, name: str, line: str) -> VelocityField:
        """A teacher as a line says."""
        own = AdapterField(self.backbone, name)
        if line == "plain":
            return own
        reference, weight = line.split()
        if reference == "base":
            asked: VelocityField = BaseField(self.backbone)
        elif reference == "other":
            asked = AdapterField(self.backbone, next(other for other in CAPABILITIES if other != name))
        else:
            asked = AdapterField(self.backbone, f"{name}-{int(100 * float(reference.removeprefix('weaker')))}")
        return ContrastField(own, asked, float(weight))


def row(line: str, found: Scored, plain: Scored) -> str:
    """A line of the table."""
    cells = []
    for measure, digits in (("generation", 3), ("editing", 2), ("exact", 3)):
        mean, low, high = difference([found[measure]], plain[measure])
        score = f"{overall(found[measure]):.{digits}f}"
        moved = f" ({mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
        cells.append(score if line == "plain" else score + moved)
    return f"| {line} | {' | '.join(cells)} |"


def main(
    lines: Annotated[str, typer.Option(help="REFERENCE WEIGHT, separated by semicolons.")] = LINES,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts, and as many edits.")] = 768,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md.")] = "contrast",
) -> None:
    """Sample and score every line, and write the table."""
    torch.set_num_threads(1)
    base, console = base_folder("base"), Console()
    evaluate = TestEvaluator(base, items, "val")
    teachers, plain = Teachers(evaluate, base), None
    RESULTS.mkdir(exist_ok=True)
    out = [
        f"{items} validation prompts and as many edits; {describe_machine()}, torch {torch.__version__}. In brackets: "
        "against the plain teacher, 95 %.",
        "",
        "| reference, weight | generation | editing O | all facts right |",
        "|---|--:|--:|--:|",
    ]
    for line in dict.fromkeys(["plain", *(one.strip() for one in lines.split(";"))]):
        found = evaluate.items_of([teachers.field(capability, line) for capability in CAPABILITIES])
        plain = found if plain is None else plain
        out.append(row(line, found, plain))
        console.print(out[-1], highlight=False)
        (RESULTS / f"{name}.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    typer.run(main)
