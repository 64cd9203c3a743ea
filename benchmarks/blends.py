"""Every way to blend, in one table on the exact world: as a blend, and as what a student starts from.

    python benchmarks/blends.py                                    # all methods, 3 seeds, blends and starts (hours)
    python benchmarks/blends.py --seconds 0                        # only as blends
    python benchmarks/blends.py --methods linear,ssr --seeds 1 --items 6 --tuning 6 --seconds 5 --name smoke

The shipped generation and editing teachers are blended by each method at several strengths (as it comes, and multiples
of the strength at which the blend has the teachers' mean energy) and at two proportions. Which is best is decided on
validation items by the smaller share of the two gaps that it closes; the table has its scores on test items. A gap is
the way from the base's score to the teacher's. Then a student of rank 80 starts from that blend and is trained by the
demo's recipe for the same processor seconds as every other, of which making the blend takes its part. Seeds decide
which entries are dropped, which rows are recorded, and the training. Finished parts are kept, one line each; it can be
interrupted and started again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality import CAPABILITIES, CurveTrainer, ImageEvaluator, curve_trainer, merging, read_lines, recipe_of
from quality import CURVES as LEARNING
from rich.console import Console

from danceopd.adapters.blend import blend_with_residual, delta_norm, scaled
from danceopd.adapters.blending.methods import METHODS
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.cli.blending.asked import Asked
from danceopd.cli.blending.data import calibration
from danceopd.common.shipped import shipped
from danceopd.common.system import describe_machine
from danceopd.engine.metrics import StepMetrics
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.lora import Adapter

RESULTS = Path(__file__).parent / "results"
PROPORTIONS = ((1.0, 1.0), (0.875, 1.125))
"""Generation and editing; the second is the demo's 0.7 to 0.9."""
SPACES = {f"{name}, core space": (name, "core") for name in ("ties", "dare-ties", "sce")}
ALL = [*METHODS, *SPACES]
LEARNS_AS = "5 steps, high noise"  # the demo's recipe
UPDATES = 4000
"""Of a start, at most: the rate is constant, and the seconds end it."""


class Enough(Exception):
    """A start has had its processor seconds."""


class Blender:
    """Blends of the two shipped teachers by name."""

    def __init__(self, prompts: int | None) -> None:
        self.prompts, like = prompts, empty_transformer(base_folder("base"))
        self.files = [shipped(c) / "pytorch_lora_weights.safetensors" for c in CAPABILITIES]
        self.teachers = [read_adapter(file, like) for file in self.files]

    def __call__(self, name: str, proportion: Sequence[float], seed: int) -> tuple[Adapter, float, float]:
        """(the blend, the strength at which it has the teachers' mean energy, processor seconds)."""
        method, space = SPACES.get(name, (name, None))
        how, began = METHODS[method], time.process_time()
        weights = [w * p for w, p in zip(how.weights(2), proportion, strict=True)]
        recorded = nullcontext()
        if how.regress is not None:
            asked = Asked((), self.prompts, "cpu")
            plan = calibration(asked, how, "base", self.files, self.teachers, Path("blend"), seed)
            recorded = plan.recording()
        with recorded as inputs:
            found = blend_with_residual(self.teachers, weights, 80, method, seed=seed, space=space, inputs=inputs)
        took = time.process_time() - began
        energies = [w * delta_norm(t) ** 2 for w, t in zip(map(abs, weights), self.teachers, strict=True)]
        mean = sum(energies) / sum(map(abs, weights))
        return found.adapter, mean**0.5 / delta_norm(found.adapter), took


def gaps(score: Sequence[float], facts: dict[str, Any], split: str) -> list[float]:
    """The shares closed of the generation gap and of the editing gap."""
    base, best = facts["references"][split]["base"], facts["references"][split]["teachers"]
    return [(s - b) / (t - b) for s, b, t in zip(score, base, best, strict=True)]


def references(evaluate: ImageEvaluator, teachers: Sequence[Adapter]) -> dict[str, Any]:
    """The base's scores, and each teacher's in its own capability."""
    each = [evaluate(teacher) for teacher in teachers]
    return {"base": evaluate(None), "teachers": [each[0][0], each[1][1]]}


def tuned(
    name: str, blender: Blender, evaluate: ImageEvaluator, strengths: Sequence[float], worth: Callable[..., float]
) -> dict[str, Any]:
    """The best proportion and strength of a method on the validation items; the strength is absolute."""
    best: dict[str, Any] = {"worth": -1e9}

    def tried(proportion: Sequence[float], blend: Adapter, own: float, factor: float | None) -> None:
        nonlocal best
        scale = 1.0 if factor is None else factor * own
        value = worth(evaluate(scaled(blend, scale)))
        if value > best["worth"]:
            best = {"worth": value, "proportion": list(proportion), "scale": scale, "factor": factor}

    blend, own, _ = blender(name, PROPORTIONS[0], 0)
    for factor in (None, *strengths):
        tried(PROPORTIONS[0], blend, own, factor)
    blend, own, _ = blender(name, PROPORTIONS[1], 0)
    tried(PROPORTIONS[1], blend, own, best["factor"])
    return best


def learnt(adapter: Adapter, spent: float, seconds: float, seed: int, rows: int) -> tuple[Adapter, int]:
    """(a student that started from `adapter` and was trained for what is left of `seconds`, its updates)."""
    began: float | None = None

    def report(metrics: StepMetrics, steps: int) -> None:
        nonlocal began
        now = time.process_time()
        began = now if began is None else began  # the first update starts the clock: loading is no one's merit
        if now - began >= seconds - spent:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, curve_trainer(False):
        start = write_adapter(adapter, Path(folder) / "start")
        recipe = recipe_of(LEARNING[LEARNS_AS], seed, UPDATES, rows, Path(folder) / "run")
        recipe = recipe.replaced({"student.init": str(start.parent), "student.init_weights": {}})
        with suppress(Enough):
            merging.merge(recipe, report)
        return CurveTrainer.latest.student(True), CurveTrainer.latest.step


def table(facts: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    test = facts["references"]["test"]
    text = [
        f"Shares of the gap from the base to the teacher that are closed, generation / editing. {facts['items']} test "
        f"prompts and as many edits; weights chosen on {facts['tuning']} validation items of each by the smaller of "
        f"the two shares. Base {test['base'][0]:.3f} / {test['base'][1]:.2f}, generation teacher "
        f"{test['teachers'][0]:.3f}, editing teacher {test['teachers'][1]:.2f}. Rank 80. {describe_machine()}, torch "
        f"{torch.__version__}.",
        "",
        f"`{facts['command']}`",
        "",
        "| method | proportion, strength | seconds | as a blend | as a start |",
        "|---|---|--:|---|---|",
    ]
    for name in ALL:
        mine = [line for line in lines if line["method"] == name]
        best = next((line for line in mine if line["kind"] == "tuned"), None)
        if best is None:
            continue
        blends = [line for line in mine if line["kind"] == "blend"]
        starts = [line for line in mine if line["kind"] == "start"]
        seconds = f"{statistics.mean(line['seconds'] for line in blends):.1f}" if blends else ""
        part = ":".join(f"{p:g}" for p in best["proportion"])
        text.append(
            f"| {name} | {part}, {best['scale']:.2f} | {seconds} | {shares(blends, facts)} | {shares(starts, facts)} |"
        )
    updates = [line["updates"] for line in lines if line["kind"] == "start"]
    if updates:
        text += ["", f"Starts were trained for {facts['seconds']:g} processor seconds each, the making of the blend "
                     f"included: {min(updates)} to {max(updates)} updates of {facts['rows']} rows."]  # fmt: skip
    else:
        text += ["", "As starts they were not run."]
    if missing := [name for name in ALL if not any(line["method"] == name for line in lines)]:
        text += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(text) + "\n"


def shares(lines: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """`71 % / 66 % (3 seeds, smallest 64 %)`; empty without a line."""
    if not lines:
        return ""
    found = [gaps(line["score"], facts, "test") for line in lines]
    means = " / ".join(f"{statistics.mean(values):.0%}" for values in zip(*found, strict=True))
    return f"{means} ({len(found)} seed{'s' * (len(found) > 1)}, worst {min(map(min, found)):.0%})"


def main(
    methods: Annotated[str, typer.Option(help=f"With commas, of {'; '.join(ALL)}; default: all.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Of each method that draws or records, and of each start.")] = 3,
    items: Annotated[int, typer.Option(min=6, help="Test prompts, and as many edits.")] = 240,
    tuning: Annotated[int, typer.Option(min=6, help="Validation items that choose the weights.")] = 120,
    strengths: Annotated[str, typer.Option(help="Multiples of the strength of mean energy.")] = "0.8,1,1.2,1.4",
    seconds: Annotated[float, typer.Option(min=0, help="Processor seconds of a start; 0: no starts.")] = 120.0,
    rows: Annotated[int, typer.Option(min=2, help="Batch size of an update.")] = 32,
    prompts: Annotated[int | None, typer.Option(help="Prompts of a teacher that are recorded.")] = None,
    limit: Annotated[float, typer.Option(help="Minutes after which it stops between two parts; 0: none.")] = 0.0,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .json and .jsonl.")] = "blends",
) -> None:
    """Tune, score and train from every blend that is not finished yet, and write the table."""
    began = time.monotonic()
    torch.set_num_threads(1)
    wanted = [m.strip() for m in methods.split(";" if ";" in methods else ",")] if methods else ALL
    if odd := next((m for m in wanted if m not in ALL), None):
        raise typer.BadParameter(f"{odd!r} is none of {'; '.join(ALL)}")
    path, facts_file = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.json"
    facts: dict[str, Any] = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    settings = {"items": items, "tuning": tuning, "rows": rows, "strengths": strengths, "prompts": prompts}
    if facts and {key: facts[key] for key in settings} != settings:
        raise typer.BadParameter(f"{facts_file} is of other settings; give --name")
    if any(line["kind"] == "start" for line in read_lines(path)) and seconds not in (0.0, facts["seconds"]):
        raise typer.BadParameter(f"{facts_file} has starts of {facts['seconds']:g} seconds; give --name")
    seconds_of_starts = seconds or facts.get("seconds", 0.0)
    blender, console = Blender(prompts), Console()
    counts = {"val": tuning, "test": items}
    evaluators = {split: ImageEvaluator(base_folder("base"), count, split) for split, count in counts.items()}
    if "references" not in facts:
        facts = settings | {"references": {s: references(e, blender.teachers) for s, e in evaluators.items()}}
    facts |= {"seconds": seconds_of_starts, "command": shlex.join(["python", *sys.argv])}
    facts_file.write_text(json.dumps(facts, indent=1) + "\n")

    def keep(line: dict[str, Any]) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        (RESULTS / f"{name}.md").write_text(table(facts, read_lines(path)))
        done, total = len(read_lines(path)), sum(1 + seeds_of(m, seeds) + seeds * (seconds > 0) for m in wanted)
        told = {key: value for key, value in line.items() if key in ("kind", "method", "seed", "score", "scale")}
        console.print(f"{done} of about {total}, {time.monotonic() - began:.0f} s: {told}", highlight=False)

    def out_of_time() -> bool:
        return bool(limit) and time.monotonic() - began > 60 * limit

    for half in ("blend", "start"):
        for method in wanted:
            lines = [line for line in read_lines(path) if line["method"] == method]
            best = next((line for line in lines if line["kind"] == "tuned"), None)
            if out_of_time() or (half == "start" and not seconds):
                break
            if best is None:
                worth = lambda score: min(gaps(score, facts, "val"))  # noqa: E731
                given = [float(word) for word in strengths.split(",")]
                best = {"kind": "tuned", "method": method, **tuned(method, blender, evaluators["val"], given, worth)}
                keep(best)
            for seed in range(seeds if half == "start" else seeds_of(method, seeds)):
                if out_of_time() or any((line["kind"], line.get("seed")) == (half, seed) for line in lines):
                    continue
                found, _, took = blender(method, best["proportion"], seed)
                found, line = scaled(found, best["scale"]), {"kind": half, "method": method, "seed": seed}
                if half == "start":
                    found, line["updates"] = learnt(found, took, seconds, seed, rows)
                keep(line | {"seconds": took, "score": evaluators["test"](found)})


def seeds_of(name: str, seeds: int) -> int:
    """How many blends a method makes: one, unless it draws or records."""
    how = METHODS[SPACES.get(name, (name, None))[0]]
    return seeds if how.random or how.regress is not None else 1


if __name__ == "__main__":
    typer.run(main)
