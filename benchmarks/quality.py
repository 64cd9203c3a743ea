"""How many updates, and seconds, until a student is as good as its teachers: the released loop, and ours step by step.

    python benchmarks/quality.py                          # learning curves (hours on one core), then the table
    python benchmarks/quality.py --pace --repeats 5       # seconds of an update, in turns, then the table
    python benchmarks/quality.py --name lengths --lengths 200,400,800,1600 --curves "averaged;5 steps, high noise"

What changes the learning (bf16, EMA, routing, rollouts, query law) gets learning curves of its own: the shipped
teachers and the demo's init, a constant learning rate, 3 seeds, scored every so many updates on validation prompts and
edits by the suite's own scorer; or, with `--lengths`, a run for every point, its learning rate falling to zero as a
user's does. What only changes the speed follows the same curve in other seconds. Time to quality is updates to quality
times the seconds of an update, both measured here. Quality is the share of the gap, from the base's score to the
teacher's, that the student has closed. Finished runs are kept, one line each; it can be interrupted and started again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from official import ReleasedOptions
from quality_table import report
from rich.console import Console
from step import medians, setups

from danceopd.adapters.blend import blend
from danceopd.adapters.read import read_adapter
from danceopd.bench.suites.scenes import Suite
from danceopd.common.shipped import shipped
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.rollout import rollout
from danceopd.engine.trainer import Trainer
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_folder, empty_transformer, load_base, pipeline_call
from danceopd.models.fields import BaseField, VelocityField
from danceopd.models.lora import Adapter
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.recipe.recipe import Recipe

merging = import_module("danceopd.merge")  # the package's `merge` is the function
RESULTS = Path(__file__).parent / "results"
CAPABILITIES = ("generation", "editing")
CONSTANT = "The rate is constant"
FALLING = "Every length is a run of its own, its rate falling to zero; the released loop has no schedule"


@dataclass(frozen=True)
class Curve:
    """A learning curve: the recipe's changes, and whether weights and Adam's moments are bf16, the EMA is scored, and
    the learning rate falls (with `--lengths`)."""

    recipe: dict[str, Any]
    bf16: bool = False
    ema: bool = True
    falls: bool = True


RELEASED: dict[str, Any] = {"rollout": {"steps": 16}, "query": {"law": "paper"}, "routing": {"per": "step"}}
BY_ROW = RELEASED | {"routing": {"per": "row"}}
CURVES = {
    "released": Curve(RELEASED, bf16=True, ema=False, falls=False),
    "fp32": Curve(RELEASED, ema=False),
    "averaged": Curve(RELEASED),
    "routes by row": Curve(BY_ROW),
    "8 steps": Curve(BY_ROW | {"rollout": {"steps": 8}}),
    "5 steps, second order": Curve(BY_ROW | {"rollout": {"steps": 5, "solver": "ab2"}}),
    "5 steps, high noise": Curve({"rollout": {"steps": 5}, "query": {"law": "high-noise"}}),
}
"""Learning curves, each with the changes of those before it; the last has Euler's steps again."""


@dataclass(frozen=True)
class Line:
    """A line of the table: the curve it follows, and how the released loop makes its updates (None: our trainer)."""

    curve: str
    released: ReleasedOptions | None = None


LINES = {
    "the released loop": Line("released", ReleasedOptions()),
    "+ encoded once": Line("released", ReleasedOptions(encode_once=True)),
    "+ stops at the query": Line("released", ReleasedOptions(encode_once=True, stop_at_query=True)),
    "+ rollout on W + BA": Line(
        "released", ReleasedOptions(encode_once=True, stop_at_query=True, merged_weights=True)
    ),
    "+ batched, our trainer from here on": Line("released"),
    "+ fp32 weights and moments": Line("fp32"),
    "+ EMA": Line("averaged"),
    "+ routes by row": Line("routes by row"),
    "+ 8 steps instead of 16": Line("8 steps"),
    "+ 5 steps of second order": Line("5 steps, second order"),
    "5 steps, queries at high noise (the demo)": Line("5 steps, high noise"),
}


class ImageEvaluator:
    """Both scores of adapters on one base: the same validation items from the same noise, decoded and read."""

    def __init__(self, base: Path, items: int, split: str = "val") -> None:
        pipe, self.suite = load_base(base), Suite(split=split)
        family = family_of(pipe)
        self.backbone, call = Backbone(pipe.transformer, family), pipeline_call(base, {}, family)
        prompts, edits = self.suite.generation_items(items), self.suite.editing_items(items)
        generation, editing = (kind(pipe, family, call) for kind in (GenerationPipeline, EditingPipeline))
        instructions, sources = [item.prompt for item in edits], [item.source for item in edits]
        self.tasks = [  # by capability: pipeline, items, conditions
            (generation, prompts, generation.conditions([item.prompt for item in prompts])),
            (editing, edits, editing.conditions(instructions, sources)),
        ]

    def __call__(self, adapter: Adapter | None) -> tuple[float, float]:
        """(share of correct pictures, mean O of the edits): means over the six categories of each."""
        with self.merged(adapter) as field:
            scores = [score for n in range(2) for score in self.scores(n, self.images(n, field))]
        found = self.suite.summarise(scores)
        return found["generation"]["overall"]["mean"], found["editing"]["overall"]["mean"]

    @contextmanager
    def merged(self, adapter: Adapter | None) -> Iterator[VelocityField]:
        """Inside, the velocity of the base with an adapter merged into its weights."""
        layers = {path: self.backbone.transformer.get_submodule(path) for path in (adapter.tensors if adapter else ())}
        pristine = {path: layer.weight.clone() for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.weight += adapter.delta(path)  # type: ignore[union-attr]
        try:
            yield BaseField(self.backbone)
        finally:
            for path, layer in layers.items():
                layer.weight.copy_(pristine[path])

    def images(self, task: int, field: VelocityField) -> Any:
        """Pictures of all items of a task: 0 generation, 1 editing."""
        pipeline, items, condition = self.tasks[task]
        ends = torch.full((len(items),), len(pipeline.sigmas()) - 1)
        noise = pipeline.noise(list(range(len(items))))
        return pipeline.images(rollout(field, noise, pipeline.sigmas(), ends, condition))

    def scores(self, task: int, images: Any) -> Any:
        """The suite's scores of them."""
        return self.suite.score(self.tasks[task][1], images)


class CurveTrainer(Trainer):
    """The trainer of a run, kept in `latest`; with `bf16` weights and Adam's moments are rounded after each update."""

    bf16 = False
    latest: CurveTrainer

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        CurveTrainer.latest = self

    def train_step(self) -> StepMetrics:
        metrics = super().train_step()
        if self.bf16:
            states = self.optimizer.adamw.state.values()
            moments = [m for state in states for k, m in state.items() if k != "step"]
            with torch.no_grad():
                for tensor in (*self.optimizer.parameters, *moments):
                    tensor.copy_(tensor.bfloat16())
        return metrics

    def update(self) -> None:
        """One more update."""
        self.train_step()
        self.step += 1

    def student(self, ema: bool) -> Adapter:
        """The student's adapter: its EMA, or the weights themselves."""
        return self.ema_adapter(None if ema else [p.detach() for p in self.optimizer.parameters])


@contextmanager
def curve_trainer(bf16: bool) -> Iterator[None]:
    """Inside, `merge` makes a `CurveTrainer`."""
    usual, merging.Trainer, CurveTrainer.bf16 = merging.Trainer, CurveTrainer, bf16  # type: ignore[misc]
    try:
        yield
    finally:
        merging.Trainer = usual  # type: ignore[misc]


def recipe_of(curve: Curve, seed: int, updates: int, rows: int, output: Path, schedule: str = "constant") -> Recipe:
    """The demo's teachers and init with the curve's changes; without validation and samples."""
    fields: dict[str, Any] = {
        "output": output, "steps": updates, "batch": rows, "seed": seed, "ema": 0.98,
        "student": {"rank": 80, "init": "blend", "init_weights": dict(zip(CAPABILITIES, (0.7, 0.9), strict=True))},
        "optimizer": {"lr": 1e-3, "warmup": 10, "schedule": schedule},
        "data": {"rows": 4096}, "validation": {"every": 0}, "samples": {"every": 0, "count": 1},
        "save_every": updates, "keep_last": 1,
    }  # fmt: skip
    return Recipe(**fields | curve.recipe)


def points_of(
    curve: Curve, seed: int, updates: int, rows: int, every: int, evaluate: ImageEvaluator, schedule: str = "constant"
) -> list[list[float]]:
    """[update, generation, editing] every so many updates of one run."""
    points: list[list[float]] = []

    def report(metrics: StepMetrics, steps: int) -> None:
        if metrics.step % every == 0:
            points.append([metrics.step, *evaluate(CurveTrainer.latest.student(curve.ema))])

    with tempfile.TemporaryDirectory() as folder, curve_trainer(curve.bf16):
        merging.merge(recipe_of(curve, seed, updates, rows, Path(folder) / "run", schedule), report)
    return points


class Started(Exception):
    """A run has made its first update; the others are timed here."""


def started(metrics: StepMetrics, steps: int) -> None:
    raise Started


def update_seconds(rows: int, repeats: int) -> dict[str, float]:
    """Median processor seconds of an update of `rows` rows, by line of the table."""
    setup = setups()["the shipped model (2 M)"]
    updates: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, line in LINES.items():
            if line.released is not None:
                updates[name] = setup.released(rows, line.released, rank=80).update
                continue
            curve = CURVES[line.curve]
            recipe = recipe_of(curve, 0, repeats + 2, rows, Path(folder) / name)
            with curve_trainer(curve.bf16), suppress(Started):
                merging.merge(recipe, started)
            updates[name] = CurveTrainer.latest.update
    return medians(updates, repeats)


def named(text: str, known: Collection[str]) -> list[str]:
    """Names separated by semicolons; BadParameter for one that is not known."""
    found = [name.strip() for name in text.split(";")]
    if odd := next((name for name in found if name not in known), None):
        raise typer.BadParameter(f"{odd!r} is none of {'; '.join(known)}")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a .jsonl file; a line that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def main(
    curves: Annotated[str, typer.Option(help=f"Of {'; '.join(CURVES)}: separated by semicolons.")] = ";".join(CURVES),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each curve.")] = 3,
    updates: Annotated[int, typer.Option(min=2, help="Optimizer steps of a curve.")] = 150,
    rows: Annotated[int, typer.Option(min=2, help="Batch size of an update.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Updates between scores.")] = 25,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts, and as many edits.")] = 240,
    lengths: Annotated[
        str, typer.Option(help="Instead of curves, a run for each of these numbers of updates, such as 200,400.")
    ] = "",
    shares: Annotated[
        str, typer.Option(help="Shares of the gap between base and teacher whose times are reported.")
    ] = "0.35,0.5,0.65",
    pace: Annotated[bool, typer.Option("--pace", help="Measure the seconds of an update instead.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed updates of each line with --pace.")] = 5,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .json and .jsonl.")] = "quality",
) -> None:
    """Make and score the runs that are not finished yet, or time the updates, and write the table."""
    torch.set_num_threads(1)
    chosen = named(curves, CURVES)
    path, facts_file = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.json"
    facts: dict[str, Any] = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    settings = {"rows": rows, "items": items, "schedule": FALLING if lengths else CONSTANT}
    if facts and {key: facts[key] for key in settings} != settings:
        raise typer.BadParameter(f"{facts_file} is of other --rows, --items or --lengths; give --name")
    facts["shares"] = [float(share) for share in shares.split(",")]

    def write() -> None:
        facts_file.write_text(json.dumps(facts, indent=1) + "\n")
        curve_of = {label: line.curve for label, line in LINES.items()}
        (RESULTS / f"{name}.md").write_text(report(curve_of, facts, read_lines(path)))

    evaluate = None
    if "references" not in facts or not pace:
        evaluate = ImageEvaluator(base_folder("base"), items)
    if "references" not in facts:
        assert evaluate is not None
        base = empty_transformer(base_folder("base"))
        teachers = {c: read_adapter(shipped(c), base) for c in CAPABILITIES}
        scores = {c: evaluate(adapter) for c, adapter in teachers.items()}
        start = evaluate(blend(list(teachers.values()), [0.7, 0.9]))
        best = [scores[c][n] for n, c in enumerate(CAPABILITIES)]
        facts |= settings | {"references": {"base": evaluate(None), "teachers": best, "start": start}}
    if pace:
        facts["paces"], facts["repeats"] = update_seconds(rows, repeats), repeats
        return write()
    write()
    assert evaluate is not None
    console = Console()
    ends = [int(length) for length in lengths.split(",")] if lengths else [updates]
    for seed in range(seeds):
        for curve, length in product(chosen, ends):
            falls = bool(lengths) and CURVES[curve].falls
            if not falls and length < max(ends):
                continue  # the longest run has its points
            done = [(run["curve"], run["seed"], run["points"][-1][0]) for run in read_lines(path)]
            if (curve, seed, length) in done:
                continue
            began, rarest = time.monotonic(), min(ends) if lengths else every
            schedule = "cosine" if falls else "constant"
            points = points_of(CURVES[curve], seed, length, rows, length if falls else rarest, evaluate, schedule)
            with open(path, "a") as file:
                file.write(json.dumps({"curve": curve, "seed": seed, "points": points}) + "\n")
            write()
            last = ", ".join(f"{value:.3f}" for value in points[-1][1:])
            took = f"{time.monotonic() - began:.0f} s"
            console.print(f"{curve}, seed {seed}, {length} updates: {last}; {took}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
