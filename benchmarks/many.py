"""Many teachers in one student: sixteen small effects, merged 2, 4, 8 and 16 at once, against blends of the same LoRAs.

    python benchmarks/many.py                                    # hours on one core; it can be interrupted
    python benchmarks/many.py --counts 2,4 --teach-steps 2 --updates 1 --items 6 --rows 4 --name tiny   # only a trial

Each effect (danceopd/worlds/toy/effects.py) is trained by `danceopd teach`, the first so many are merged by `danceopd
merge` in a process of its own, and blended at the strength that is best on validation items. Every model is scored on
test items of every effect from the same noise: the share of the gap from the base to the effect's own teacher that it
closes, what it changed outside, seconds of an update, and the peak of memory. Teachers, merges and scores that are
there are kept: the same command goes on where it stopped, and another `--blend-methods` or `--arms` adds to the table.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from past import difference
from quality import ImageEvaluator, named, read_lines
from rich.console import Console

from danceopd.adapters.read import read_adapter
from danceopd.bench.suites.scenes import Suite
from danceopd.common.files import sha256
from danceopd.common.system import describe_machine
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.lora import Adapter
from danceopd.pipelines import EditingPipeline
from danceopd.worlds.scenes.edits import edits
from danceopd.worlds.scenes.prompts import prompts
from danceopd.worlds.toy.effects import EFFECTS
from danceopd.worlds.toy.stages import STAGES, teach

RESULTS = Path(__file__).parent / "results"
ARMS: dict[str, dict[str, Any]] = {"merge": {}, "by need": {"routing": {"per": "need"}}}
"""Each arm's changes of the merge's recipe."""
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Of every LoRA in a blend; the best on validation items is scored, and the method's own default is among those tried.
"""
WITH_DATA = ("regmean", "regmean++", "ssr")
"""Blends that look at what the LoRAs do to inputs of their own."""
LEAST_GAP = 0.05
"""A teacher that is no more than this ahead of its base has no gap to close."""
CLOSED = 0.85
"""The share of its gap that every effect should close."""

Scored = dict[str, list[float]]
"""Effect -> one number in [0, 1] for each item."""


class Effects(Suite):
    """Items of single effects, as the suite of the scenes has them."""

    def __init__(self, items: int, split: str) -> None:
        super().__init__(split=split)
        self.items = items

    def _tasks(self, name: str) -> Any:
        effect = EFFECTS[name]
        if name not in self._sampled:
            draw: Callable[..., Any] = prompts if effect.capability == "generation" else edits
            key = "tags" if effect.capability == "generation" else "tasks"
            self._sampled[name] = draw(self.split, self.items, self.seed, **{key: (effect.task,)})
        return self._sampled[name]


class Evaluator(ImageEvaluator):
    """Every item's score under an adapter, effect by effect."""

    def __init__(self, base: Path, items: int, split: str) -> None:
        super().__init__(base, 6)
        pipelines, self.suite = [task[0] for task in self.tasks], Effects(items, split)
        self.tasks = []
        for name in EFFECTS:
            found = self.suite._items(name, None)
            texts, pipeline = [item.prompt for item in found], pipelines[EFFECTS[name].capability == "editing"]
            edited = isinstance(pipeline, EditingPipeline)
            condition = pipeline.conditions(texts, *([[item.source for item in found]] if edited else []))
            self.tasks.append((pipeline, found, condition))

    def items(self, adapter: Adapter | None, names: Sequence[str] = tuple(EFFECTS)) -> Scored:
        """The scores of these effects; of an edit, O / 10."""
        found = {}
        with self.merged(adapter) as field:
            for n, name in enumerate(EFFECTS):
                if name in names:
                    most = 10 if EFFECTS[name].capability == "editing" else 1
                    found[name] = [round(s.value / most, 4) for s in self.scores(n, self.images(n, field))]
        return found


class Bench:
    """The folder of a benchmark: teachers, merges, and the lines of scores that are there."""

    def __init__(self, folder: Path, name: str, items: int) -> None:
        self.folder, self.base = folder, base_folder("base")
        RESULTS.mkdir(exist_ok=True)
        self.path, self.table = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.md"
        self.lines, self.items = read_lines(self.path), items
        self.console = Console()

    @cached_property
    def test(self) -> Evaluator:
        return Evaluator(self.base, self.items, "test")

    @cached_property
    def validation(self) -> Evaluator:
        return Evaluator(self.base, max(6, self.items // 4), "val")

    def line(self, model: str) -> dict[str, Any] | None:
        """The line of a model that is scored; None where there is none yet."""
        return next((line for line in self.lines if line["model"] == model), None)

    def keep(self, model: str, adapter: Adapter | None, **facts: Any) -> None:
        """Score a model, and write its line."""
        line = {"model": model, **facts, "scored": self.test.items(adapter)}
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        means = {name: round(statistics.mean(values), 3) for name, values in line["scored"].items()}
        self.console.print(f"{model}: {means}", highlight=False)
        self.table.write_text(table(self.lines))

    def adapter(self, file: Path) -> Adapter:
        """A LoRA of the base."""
        return read_adapter(file, empty_transformer(self.base))

    def blended(self, names: Sequence[str], method: str, strength: float | None, options: Mapping[str, Any]) -> Adapter:
        """A blend of teachers by `danceopd blend`; methods that look at data read the merge's own."""
        output, weights = self.folder / "blend", "" if strength is None else ",".join([str(strength)] * len(names))
        command = [sys.executable, "-m", "danceopd", "blend", *(str(self.folder / name) for name in names), "--method"]
        command += [method, "--weights", weights, "--rank", str(options["rank"]), "-o", str(output), "--base", "base"]
        if method in WITH_DATA:
            file = self.folder / "blend.yaml"
            recipe = self.recipe(names, "merge", self.folder / "no-run", options)
            file.write_text(yaml.safe_dump(recipe, sort_keys=False))
            command += ["--data", str(file)]
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return self.adapter(output)

    def blends(
        self, names: Sequence[str], teachers: Mapping[str, Adapter], method: str, options: Mapping[str, Any]
    ) -> None:
        """Blend these teachers at the strength that closes their gaps best on validation items, and score that."""
        model = f"{method} of {len(names)}"
        if self.line(model) is not None:
            return
        own = self.validation
        low = own.items(None, names)
        high = {name: own.items(teachers[name], [name])[name] for name in names}
        tried: dict[float | None, float] = {}
        for strength in (None, *STRENGTHS):
            found = own.items(self.blended(names, method, strength, options), names)
            shares = [closed(found[name], low[name], high[name]) for name in names]
            tried[strength] = statistics.mean([share for share in shares if share is not None] or [0.0])
        best = max(tried, key=lambda strength: tried[strength])
        made = self.blended(names, method, best, options)
        self.keep(model, made, count=len(names), strength="the method's own" if best is None else best)

    def merge(self, names: Sequence[str], arm: str, options: Mapping[str, Any]) -> None:
        """Merge these teachers in a process of its own, and score the student."""
        model = f"{arm} of {len(names)}"
        if self.line(model) is not None:
            return
        output = self.folder / model.replace(" ", "-")
        file = self.folder / f"{output.name}.yaml"
        file.write_text(yaml.safe_dump(self.recipe(names, arm, output, options), sort_keys=False))
        peak, status = run([sys.executable, "-m", "danceopd", "merge", str(file)])
        if status:
            raise SystemExit(f"danceopd merge {file} ended with status {status}; the same command goes on")
        updates = [line for line in read_lines(output / "metrics.jsonl") if "samples/s" in line]
        seconds = statistics.median(options["rows"] / line["samples/s"] for line in updates)
        weights = output / "pytorch_lora_weights.safetensors"
        facts = {"count": len(names), "seconds": round(seconds, 4), "peak": peak, "bytes": weights.stat().st_size}
        self.keep(model, self.adapter(weights), updates=len(updates), sha256=sha256(weights), **facts)

    def recipe(self, names: Sequence[str], arm: str, output: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """The merge's recipe: as many updates for each teacher, however many there are."""
        teachers = [
            {"name": name, "adapter": str((self.folder / name).absolute()), "capability": EFFECTS[name].capability,
             "data": EFFECTS[name].data}
            for name in names
        ]  # fmt: skip
        steps = options["updates"] * len(names)
        return {
            "base": "base", "teachers": teachers, "output": str(output.absolute()), "device": "cpu",
            "steps": steps, "batch": options["rows"], "seed": options["seed"], "ema": 0.98,
            "student": {"rank": options["rank"]},
            "optimizer": {"lr": 1e-3, "warmup": 10, "schedule": "cosine"},
            "rollout": {"steps": 5}, "query": {"law": "high-noise"}, "data": {"rows": 256},
            "samples": {"every": 0, "count": 2}, "save_every": max(1, steps // 10),
            "validation": {"every": max(1, steps // 10), "rows": 4}, **ARMS[arm],
        }  # fmt: skip


def run(command: list[str]) -> tuple[int, int]:
    """(peak of resident memory in bytes, exit status) of a process, whose output is shown."""
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), process.returncode


def closed(model: Sequence[float], base: Sequence[float], teacher: Sequence[float]) -> float | None:
    """The share of the gap from base to teacher that a model closes; None where there is hardly a gap."""
    low, high = statistics.mean(base), statistics.mean(teacher)
    return (statistics.mean(model) - low) / (high - low) if high - low >= LEAST_GAP else None


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every model's gaps closed and cost, then every model's score in every effect."""
    scored = {line["model"]: line["scored"] for line in lines}
    base = scored.get("base")
    if base is None:
        return "The base is not scored yet.\n"
    taught = [name for name in EFFECTS if name in scored]
    items = len(next(iter(base.values())))
    made = [line for line in lines if "count" in line]
    out = [
        f"{items} test items of each effect; {describe_machine()}, torch {torch.__version__}. Closed: the share of the "
        f"gap from the base to the effect's own teacher; in brackets how many effects close {CLOSED:.0%} of theirs or "
        "more. Below: effects, merged or not, in which the model is worse than the base: the whole 95 % interval of "
        "the paired difference is below 0.",
        "",
        "| model | strength | closed, mean | closed, least | below the base | s an update | peak memory | file |",
        "|---|---|--:|---|---|--:|--:|--:|",
    ]
    for line in sorted(made, key=lambda line: line["count"]):
        mine = {name: closed(line["scored"][name], base[name], scored[name][name])
                for name in list(EFFECTS)[: line["count"]] if name in scored}  # fmt: skip
        shares = {name: share for name, share in mine.items() if share is not None}
        worse = [n for n in EFFECTS if difference([{n: line["scored"][n]}], {n: base[n]})[2] < 0]
        least = min(shares, key=lambda name: shares[name], default="")
        enough = sum(share >= CLOSED for share in shares.values())
        out.append(
            f"| {line['model']} | {line.get('strength', '')} | "
            + (f"{statistics.mean(shares.values()):.0%} ({enough} of {len(shares)})" if shares else "")
            + f" | {f'{least} {shares[least]:.0%}' if least else ''} | {', '.join(worse) or 'none'} | "
            + (f"{line['seconds']:.2f} | {line['peak'] / 1e9:.2f} GB | {line['bytes'] / 1e6:.1f} MB |"
               if "peak" in line else "| | |")
        )  # fmt: skip
    models = ["base", *(line["model"] for line in made), *taught]
    out += ["", "Scores (0 to 1; of an edit O / 10): effects in rows, models in columns.", ""]
    out += ["| effect | " + " | ".join(models) + " |", "|---|" + "--:|" * len(models)]
    for name in EFFECTS:
        cells = [f"{statistics.mean(scored[model][name]):.2f}" for model in models]
        out.append(f"| {name} | " + " | ".join(f"**{c}**" if m == name else c for m, c in zip(models, cells)) + " |")
    return "\n".join(out) + "\n"


def main(
    counts: Annotated[str, typer.Option(help="How many effects are merged at once, such as 2,4,8,16.")] = "2,4,8,16",
    arms: Annotated[str, typer.Option(help=f"Of {'; '.join(ARMS)}: separated by semicolons.")] = ";".join(ARMS),
    blend_methods: Annotated[str, typer.Option(help="As of `danceopd blend --method`, with commas.")] = "linear,ties",
    teach_steps: Annotated[int, typer.Option(min=0, help="Steps of each teacher; 0: the effect's own.")] = 0,
    updates: Annotated[int, typer.Option(min=1, help="Updates of a merge for each of its teachers.")] = 60,
    rows: Annotated[int, typer.Option(min=2, help="Rows of an update.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Rank of students and blends.")] = 128,
    items: Annotated[int, typer.Option(min=6, help="Test items of each effect.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Of teachers and merges.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where teachers and students are.")] = Path("build/many"),
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md and .jsonl.")] = "many",
) -> None:
    """Teach, merge, blend and score what is not there yet, and write the table."""
    torch.set_num_threads(1)
    chosen = named(arms, ARMS)
    numbers = sorted({int(count) for count in counts.split(",")})
    if not all(2 <= count <= len(EFFECTS) for count in numbers):
        raise typer.BadParameter(f"--counts is {counts}; give numbers from 2 to {len(EFFECTS)}")
    settings = {"teach_steps": teach_steps, "updates": updates, "rows": rows, "rank": rank, "items": items,
                "seed": seed}  # fmt: skip
    folder = folder / name  # a trial of few steps and the real run share no teacher
    folder.mkdir(parents=True, exist_ok=True)
    bench, facts = Bench(folder, name, items), folder / f"{name}.json"
    if facts.is_file() and json.loads(facts.read_text()) != settings:
        raise typer.BadParameter(f"{facts} is of other settings ({facts.read_text().strip()}); give them, or --name")
    facts.write_text(json.dumps(settings) + "\n")
    effects = list(EFFECTS)[: max(numbers)]
    for effect in effects:
        steps = teach_steps or STAGES[effect].steps
        if not (folder / effect / f"{effect}.json").is_file():
            bench.console.print(f"teaching {effect}, {steps} steps")
            teach(effect, folder / effect, steps, seed)
    if bench.line("base") is None:
        bench.keep("base", None)
    teachers = {effect: bench.adapter(folder / effect) for effect in effects}
    for effect in effects:
        if bench.line(effect) is None:
            bench.keep(effect, teachers[effect])
    for count in numbers:
        for method in blend_methods.split(","):
            bench.blends(effects[:count], teachers, method.strip(), settings)
        for arm in chosen:
            bench.merge(effects[:count], arm, settings)
    bench.table.write_text(table(bench.lines))


if __name__ == "__main__":
    typer.run(main)
