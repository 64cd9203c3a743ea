"""How soon the student has closed its teachers' gaps: the released loop, and ours with each difference added in turn.

    python benchmarks/quality.py                          # learning curves (hours on one core), then the table
    python benchmarks/quality.py --pace --repeats 5       # seconds of an update, each way in turn, then the table
    python benchmarks/quality.py --name lengths --lengths 200,400,800,1600 --curves "averaged;5 steps, high noise"

What changes the mathematics (numerics, averaging, routes, walk) gets learning curves of its own: the shipped teachers
and the demo's start, a constant rate, 3 seeds, scored every so many updates on validation prompts and edits by the
suite's own scorer; or, with `--lengths`, a run for every point, its rate falling to zero as a user's does. What only
changes the speed has none: its updates are the same, and cost other seconds. Time to quality is updates to quality
times the seconds of an update, both measured here. A gap is closed by the share of the way from the base to the
teacher. Finished runs are kept, one line each; interrupt it when you like.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from official import Habits
from quality_table import report
from rich.console import Console
from step import medians, worlds

from danceopd.backbone import Backbone
from danceopd.base_model import base_folder, empty_transformer, load_base
from danceopd.bench.suites.scenes import Suite
from danceopd.blend import blend
from danceopd.fields import BaseField, VelocityField
from danceopd.figures import Progress
from danceopd.loop import STUDENT, Loop
from danceopd.lora import Adapter, read_adapter
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.recipe import Recipe
from danceopd.rollout import rollout
from danceopd.shipped import shipped
from danceopd.work import call_of

merging = import_module("danceopd.merge")  # the package's `merge` is the function
RESULTS = Path(__file__).parent / "results"
CAPABILITIES = ("generation", "editing")
CONSTANT = "The rate is constant"
FALLING = "Every length is a run of its own, its rate falling to zero; the released loop has no schedule"

@dataclass(frozen=True)
class Maths:
    """What is learnt: changes of the recipe; whether weights and moments are in bf16, are averaged, and rates fall."""

    recipe: dict[str, Any]
    bf16: bool = False
    averaged: bool = True
    falls: bool = True


RELEASED: dict[str, Any] = {"rollout": {"steps": 16}, "query": {"law": "paper"}, "routing": {"per": "step"}}
BY_ROW = RELEASED | {"routing": {"per": "row"}}
EIGHT = BY_ROW | {"rollout": {"steps": 8}}
CURVES = {
    "released": Maths(RELEASED, bf16=True, averaged=False, falls=False),
    "fp32": Maths(RELEASED, averaged=False),
    "averaged": Maths(RELEASED),
    "routes by row": Maths(BY_ROW),
    "8 steps": Maths(EIGHT),
    "5 steps, second order": Maths(BY_ROW | {"rollout": {"steps": 5, "solver": "ab2"}}),
    "5 steps, high noise": Maths({"rollout": {"steps": 5}, "query": {"law": "high-noise"}}),
    "8 steps, persistent": Maths(EIGHT | {"rollout": {"steps": 8, "persistent": 4}}),
}
"""Learning curves, each with what the ones before it have, but for the last, which is an experiment on `8 steps`."""


@dataclass(frozen=True)
class Way:
    """A line of the table: which curve it follows, and how it makes its updates (None: our loop)."""

    curve: str
    habits: Habits | None = None


WAYS = {
    "the released loop": Way("released", Habits()),
    "+ encoded once": Way("released", Habits(caches=True)),
    "+ stops at the query": Way("released", Habits(caches=True, stops=True)),
    "+ merged walk": Way("released", Habits(caches=True, stops=True, merges=True)),
    "+ batched, formed (from here ours)": Way("released"),
    "+ fp32 weights and moments": Way("fp32"),
    "+ average of the weights": Way("averaged"),
    "+ routes by row": Way("routes by row"),
    "+ 8 steps instead of 16": Way("8 steps"),
    "+ 5 steps of second order": Way("5 steps, second order"),
    "5 steps, asked at high noise (the demo)": Way("5 steps, high noise"),
    "8 steps, persistent walks (experiment)": Way("8 steps, persistent"),
}


class Judge:
    """Both scores of adapters on one base: the same validation items from the same noise, decoded and read."""

    def __init__(self, base: Path, items: int) -> None:
        pipe, self.suite = load_base(base), Suite(split="val")
        family = family_of(pipe)
        self.backbone, call = Backbone(pipe.transformer, family), call_of(base, {}, family)
        words, edits = self.suite.generation_items(items), self.suite.editing_items(items)
        draw, edit = (kind(pipe, family, call) for kind in (GenerationPipeline, EditingPipeline))
        instructions, sources = [item.prompt for item in edits], [item.source for item in edits]
        self.work = [
            (draw, words, draw.conditions([item.prompt for item in words])),
            (edit, edits, edit.conditions(instructions, sources)),
        ]

    def __call__(self, adapter: Adapter | None) -> tuple[float, float]:
        """(share of correct pictures, mean O): means over the six categories of each."""
        with self.acting(adapter) as field:
            scores = [score for n in range(2) for score in self.scores(n, self.drawn(n, field))]
        found = self.suite.summarise(scores)
        return found["generation"]["overall"]["mean"], found["editing"]["overall"]["mean"]

    @contextmanager
    def acting(self, adapter: Adapter | None) -> Iterator[VelocityField]:
        """The velocity of the base with an adapter in its weights."""
        layers = {path: self.backbone.transformer.get_submodule(path) for path in (adapter.tensors if adapter else ())}
        pristine = {path: layer.weight.clone() for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.weight += adapter.delta(path)  # type: ignore[union-attr]
        try:
            yield BaseField(self.backbone)
        finally:
            for path, layer in layers.items():
                layer.weight.copy_(pristine[path])

    def drawn(self, work: int, field: VelocityField) -> Any:
        """Pictures of all items of a work."""
        draw, items, condition = self.work[work]
        ends = torch.full((len(items),), len(draw.sigmas()) - 1)
        return draw.images(rollout(field, draw.noise(list(range(len(items)))), draw.sigmas(), ends, condition))

    def scores(self, work: int, pictures: Any) -> Any:
        """The suite's scores of them."""
        return self.suite.score(self.work[work][1], pictures)


class Learning(Loop):
    """The loop of a run, kept where it can be looked at; with `bf16` its weights and moments are rounded to that."""

    bf16 = False
    latest: Learning

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        Learning.latest = self

    def _descend(self, done: Progress) -> None:
        super()._descend(done)
        if self.bf16:
            moments = [m for state in self.optimizer.state.values() for k, m in state.items() if k != "step"]
            with torch.no_grad():
                for tensor in (*self.parameters, *moments):
                    tensor.copy_(tensor.bfloat16())

    def one(self) -> None:
        """One more update."""
        self._update()
        self.step += 1

    def learnt(self, averaged: bool) -> Adapter:
        """The student as it is exported."""
        tensors = [t.detach().clone() for t in (self.average if averaged else self.parameters)]
        modules = self.backbone.modules(STUDENT)
        return Adapter(dict(zip(modules, zip(tensors[::2], tensors[1::2], strict=True), strict=True)))


@contextmanager
def learning(bf16: bool) -> Iterator[None]:
    """Inside, `merge` makes a `Learning`."""
    usual, merging.Loop, Learning.bf16 = merging.Loop, Learning, bf16  # type: ignore[misc]
    try:
        yield
    finally:
        merging.Loop = usual  # type: ignore[misc]


def recipe_of(maths: Maths, seed: int, updates: int, rows: int, output: Path, schedule: str = "constant") -> Recipe:
    """The demo's start and teachers, no pictures."""
    fields: dict[str, Any] = {
        "output": output, "steps": updates, "batch": rows, "seed": seed, "ema": 0.98,
        "student": {"rank": 80, "init": "blend", "init_weights": dict(zip(CAPABILITIES, (0.7, 0.9), strict=True))},
        "optimizer": {"lr": 1e-3, "warmup": 10, "schedule": schedule},
        "data": {"rows": 4096}, "gap": {"every": 0}, "samples": {"every": 0, "count": 1},
        "save_every": updates, "keep_last": 1,
    }  # fmt: skip
    return Recipe(**fields | maths.recipe)


def curve_of(
    maths: Maths, seed: int, updates: int, rows: int, every: int, judge: Judge, schedule: str = "constant"
) -> list[list[float]]:
    """[update, generation, editing] every so many updates."""
    points: list[list[float]] = []

    def look(done: Progress, steps: int) -> None:
        if done.step % every == 0:
            points.append([done.step, *judge(Learning.latest.learnt(maths.averaged))])

    with tempfile.TemporaryDirectory() as folder, learning(maths.bf16):
        merging.merge(recipe_of(maths, seed, updates, rows, Path(folder) / "run", schedule), look)
    return points


class _Begun(Exception):
    """A run has made its first update, and the rest is made here."""


def _begun(done: Progress, steps: int) -> None:
    raise _Begun


def paces(rows: int, repeats: int) -> dict[str, float]:
    """Median processor seconds of an update, by way, on as many rows."""
    world = worlds()["the shipped model (2 M)"]
    ways: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            if way.habits is not None:
                ways[name] = world.released(rows, way.habits, rank=80).update
                continue
            maths = CURVES[way.curve]
            recipe = recipe_of(maths, 0, repeats + 2, rows, Path(folder) / name)
            with learning(maths.bf16), suppress(_Begun):
                merging.merge(recipe, _begun)
            ways[name] = Learning.latest.one
    return medians(ways, repeats)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Finished curves; a line that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def main(
    curves: Annotated[str, typer.Option(help=f"Of {'; '.join(CURVES)}: separated by semicolons.")] = ";".join(CURVES),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    updates: Annotated[int, typer.Option(min=2)] = 150,
    rows: Annotated[int, typer.Option(min=2, help="Of an update.")] = 32,
    every: Annotated[int, typer.Option(min=1, help="Updates between scores.")] = 25,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts, and as many edits.")] = 240,
    lengths: Annotated[str, typer.Option(help="A run of its own for each so many updates: 200,400. No curves.")] = "",
    shares: Annotated[str, typer.Option(help="Shares of both gaps whose times are reported.")] = "0.35,0.5,0.65",
    pace: Annotated[bool, typer.Option("--pace", help="Measure the seconds of an update instead.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of --pace.")] = 5,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .json and .jsonl.")] = "quality",
) -> None:
    """Learn and score whatever curve is not done, or measure the paces, and write the table."""
    torch.set_num_threads(1)
    chosen = [curve.strip() for curve in curves.split(";")]
    if odd := next((curve for curve in chosen if curve not in CURVES), None):
        raise typer.BadParameter(f"{odd!r} is none of {'; '.join(CURVES)}")
    path, facts_file = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.json"
    facts: dict[str, Any] = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    how = {"rows": rows, "items": items, "schedule": FALLING if lengths else CONSTANT}
    if facts and {key: facts[key] for key in how} != how:
        raise typer.BadParameter(f"{facts_file} is of other --rows, --items or --lengths; give --name")
    facts["shares"] = [float(share) for share in shares.split(",")]

    def write() -> None:
        facts_file.write_text(json.dumps(facts, indent=1) + "\n")
        lines = {line: way.curve for line, way in WAYS.items()}
        (RESULTS / f"{name}.md").write_text(report(lines, facts, read_lines(path)))

    judge = None
    if "references" not in facts or not pace:
        judge = Judge(base_folder("base"), items)
    if "references" not in facts:
        assert judge is not None
        base = empty_transformer(base_folder("base"))
        held = {c: read_adapter(shipped(c), base) for c in CAPABILITIES}
        scores = {c: judge(adapter) for c, adapter in held.items()}
        start = judge(blend(list(held.values()), [0.7, 0.9]))
        best = [scores[c][n] for n, c in enumerate(CAPABILITIES)]
        facts |= how | {"references": {"base": judge(None), "teachers": best, "start": start}}
    if pace:
        facts["paces"], facts["repeats"] = paces(rows, repeats), repeats
        return write()
    write()
    assert judge is not None
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
            points = curve_of(CURVES[curve], seed, length, rows, length if falls else rarest, judge, schedule)
            with open(path, "a") as file:
                file.write(json.dumps({"curve": curve, "seed": seed, "points": points}) + "\n")
            write()
            last = ", ".join(f"{value:.3f}" for value in points[-1][1:])
            took = f"{time.monotonic() - began:.0f} s"
            console.print(f"{curve}, seed {seed}, {length} updates: {last}; {took}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
