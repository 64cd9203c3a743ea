"""What it saves to compute once a walk what stays over it: operators and processor seconds, beside computing it all.

    python benchmarks/steady.py [--repeats 15]

Ragged walks of 8 steps under the bare base: every family's tiny random pipelines (as the tests have them; their blocks
are few, so the share of what stays is larger than in a real model) and the shipped model. Operators are counted below
autograd, as the device sees them. The ways take turns on the same noise; medians. Writes benchmarks/results/steady.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from step import medians
from torch.utils._python_dispatch import TorchDispatchMode

from danceopd.backbone import Backbone
from danceopd.base_model import base_folder, load_base
from danceopd.fields import BaseField
from danceopd.machine import describe
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.pipelines.families import FAMILIES
from danceopd.rollout import rollout
from danceopd.work import call_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tinies import TINYS  # noqa: E402
from walk_cases import afresh  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "steady.md"
STEPS, WORDS = 8, ["a red circle", "a white ring", "a blue square", "a green star"]


class Operators(TorchDispatchMode):
    """Counts operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def walks(pipe: Any, call: dict[str, Any], rows: int) -> dict[str, Callable[[], Any]]:
    """The walk both ways, of `rows` rows that stop at all depths from a half on."""
    family = family_of(pipe) if "family" not in call else FAMILIES[call.pop("family")]
    draw = GenerationPipeline(pipe, family, call | {"steps": STEPS})
    field, sigmas = BaseField(Backbone(pipe.transformer, family)), draw.sigmas()
    condition = draw.conditions([WORDS[row % len(WORDS)] for row in range(rows)])
    noise, stop = draw.noise(list(range(rows))), torch.arange(rows) % (STEPS // 2) + STEPS // 2 + 1
    ways = {"anew": afresh(field), "kept": field}
    return {name: lambda f=f: rollout(f, noise, sigmas, stop, condition) for name, f in ways.items()}


def main(repeats: Annotated[int, typer.Option(min=1)] = 15) -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    worlds: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
        tiny.family: (tiny.build, tiny.call | {"family": tiny.family}, 4) for tiny in reversed(TINYS)
    }
    folder = base_folder("base")
    shipped = load_base(folder)
    for rows in (4, 32):
        call = call_of(folder, {}, family_of(shipped))
        worlds[f"the shipped model, {rows} rows"] = (lambda: load_base(folder), call, rows)
    lines = [
        f"`python benchmarks/steady.py --repeats {repeats}`: {describe()}, torch {torch.__version__}. Walks of {STEPS} "
        "steps, 4 rows where nothing else is said, fp32, one thread; median processor seconds.",
        "",
        "| walk | operators, all anew | kept | fewer | seconds, all anew | kept | times as fast |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, (build, call, rows) in worlds.items():
        ways = walks(build(), dict(call), rows)
        counts = {}
        for way, walk in ways.items():
            walk()  # levels are known from the second walk on
            with Operators() as operators:
                walk()
            counts[way] = operators.count
        times = medians(ways, repeats)
        a, k = counts["anew"], counts["kept"]
        lines.append(
            f"| {name} | {a} | {k} | {1 - k / a:.0%} | {times['anew']:.4f} | {times['kept']:.4f} | "
            f"{times['anew'] / times['kept']:.2f}x |"
        )
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
