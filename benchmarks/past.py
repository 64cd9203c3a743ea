"""How far past its teachers a student is: the arms of a recipe side by side at equal seconds, on the test split.

    python benchmarks/past.py                                          # the demo's recipe: 5 seeds of every arm
    python benchmarks/past.py checkpoints/full.yaml --name past_full --arms "as it is" --seeds 3

An arm is the recipe with some changes. Its steps are as many as take the recipe's own processor seconds; seconds of
an update are measured first, the arms in turn. Every run is scored item by item on the same test prompts and edits from
the same noise as its teachers; differences are paired by item, and intervals (95 %) resample seeds and items, within
categories. Finished runs are kept, one line each, and the one at hand in build/; it can be interrupted and started
again, and several may share the seeds (--first).
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from quality import (
    CAPABILITIES,
    CurveTrainer,
    ImageEvaluator,
    Started,
    curve_trainer,
    merging,
    named,
    read_lines,
    started,
)
from rich.console import Console
from step import medians

from danceopd.adapters.blend import blend
from danceopd.adapters.read import read_adapter
from danceopd.bench.suites.scenes import Suite
from danceopd.common.system import describe_machine
from danceopd.engine.rollout import rollout
from danceopd.labelfree.statistics import spread
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.fields import VelocityField
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "plain": {"contrast": None},
    "contrast, base": {
        "contrast": {"generation": {"reference": "base"}, "editing": {"reference": "base", "weight": 0.5}},
    },
    "contrast, others": {"contrast": {"generation": {}, "editing": {"weight": 0.3}}},
    "nft": {"contrast": None, "objective": "nft", "nft": {"share": 0.5, "group": 8}},
    "both": {"objective": "nft", "nft": {"share": 0.5, "group": 8}},
    "joint SFT": {"contrast": None, "objective": "supervised", "rollout": None},
    "off-policy": {"contrast": None, "objective": "offpolicy", "rollout": None},
    "DiffusionOPD": {"contrast": None, "objective": "diffusionopd", "query": None},
    "Flow-OPD": {
        "contrast": None, "objective": "flowopd", "query": None, "rollout": {"steps": 5, "noise": 0.7},
    },
}  # fmt: skip
"""Each arm's changes of the recipe's top-level keys; None leaves one out. `others` is the default reference."""
RUNS = Path(__file__).parent.parent / "build" / "past"
"""Runs that are not finished."""
QUIET: dict[str, Any] = {"samples": {"every": 0, "count": 1}, "validation": {"every": 0}, "keep_last": 1}
WEIGHTS = (0.3, 0.5, 0.7, 0.9)
"""Of each teacher in the linear blend; the best pair by the two gaps closed, on validation items, is scored."""
PROMPTS, PICTURES = 32, 8
"""Diversity: 1 - the mean cosine between so many pictures of one prompt, over so many prompts."""
RESAMPLES = 2000
SUITES = 512
"""Items of one suite seed."""

Scored = dict[str, dict[str, list[float]]]
"""Measure (generation, editing, exact) -> category -> one number for each item."""


class TestEvaluator(ImageEvaluator):
    """Scores of adapters item by item, on the first suites of a split, from the same noise."""

    def __init__(self, base: Path, items: int, split: str = "test") -> None:
        super().__init__(base, 6)
        self.parts = []
        for seed in range(-(-items // SUITES)):
            suite, size = Suite(split=split, seed=seed), min(SUITES, items - seed * SUITES)
            prompts, edits = suite.generation_items(size), suite.editing_items(size)
            generation, editing = (task[0] for task in self.tasks)
            sources = [item.source for item in edits]
            self.parts.append((suite, [
                (generation, prompts, generation.conditions([item.prompt for item in prompts])),
                (editing, edits, editing.conditions([item.prompt for item in edits], sources)),
            ]))  # fmt: skip

    def items(self, adapter: Adapter | None) -> Scored:
        """Every item's score: generation 0 or 1, editing O, and exact 0 or 1."""
        with self.merged(adapter) as field:
            return self.items_of([field, field])

    def items_of(self, fields: Sequence[VelocityField]) -> Scored:
        """The same of a field for each capability."""
        found: Scored = {"generation": {}, "editing": {}, "exact": {}}
        for suite, tasks in self.parts:
            self.suite, self.tasks = suite, tasks
            for n, capability in enumerate(CAPABILITIES):
                for score in self.scores(n, self.images(n, fields[n])):
                    category = score.item.category
                    found[capability].setdefault(category, []).append(round(score.value, 4))
                    if capability == "editing":
                        found["exact"].setdefault(category, []).append(float(score.correct))
        return found

    def diversity(self, adapter: Adapter | None) -> float:
        """How much the pictures of one prompt differ."""
        pipeline, _, condition = self.parts[0][1][0]
        prompts = min(PROMPTS, len(condition))
        condition = condition.rows([row for row in range(prompts) for _ in range(PICTURES)])
        ends = torch.full((prompts * PICTURES,), len(pipeline.sigmas()) - 1)
        noise = pipeline.noise(list(range(prompts * PICTURES)))
        with self.merged(adapter) as field:
            return spread(rollout(field, noise, pipeline.sigmas(), ends, condition), PICTURES)


def overall(scored: Mapping[str, list[float]]) -> float:
    """The unweighted mean of the category means."""
    return float(np.mean([np.mean(values) for values in scored.values()]))


def difference(
    students: list[Mapping[str, list[float]]], teacher: Mapping[str, list[float]], seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of students less a teacher: the mean over categories, seeds and items resampled."""
    random = np.random.default_rng(seed)
    groups = [
        np.array([student[category] for student in students]) - np.array(values) for category, values in teacher.items()
    ]
    which = random.integers(0, len(students), (RESAMPLES, len(students)))
    total = np.zeros(RESAMPLES)
    for group in groups:
        columns = random.integers(0, group.shape[1], (RESAMPLES, group.shape[1]))
        total += np.array([group[np.ix_(rows, picked)].mean() for rows, picked in zip(which, columns, strict=True)])
    low, high = np.percentile(total / len(groups), [2.5, 97.5])
    return float(np.mean([group.mean() for group in groups])), float(low), float(high)


def below(students: list[Scored], teachers: Mapping[str, Scored]) -> list[str]:
    """Categories in which the students are below the better teacher, the whole interval below 0."""
    found = []
    for measure in CAPABILITIES:
        for category in teachers[measure][measure]:
            best = max((teacher[measure][category] for teacher in teachers.values()), key=np.mean)
            mean, _, high = difference([{category: one[measure][category]} for one in students], {category: best})
            if high < 0:
                found.append(f"{category} {mean:+.2f}")
    return found


def recipe_of(plain: Mapping[str, Any], arm: str, **fields: Any) -> Recipe:
    """The recipe with an arm's changes, without validation and samples."""
    changed = {**plain, **QUIET, **ARMS[arm], **fields}
    return Recipe(**{key: value for key, value in changed.items() if value is not None})


def steps_of(plain: Mapping[str, Any], arms: list[str], repeats: int) -> dict[str, int]:
    """Steps of each arm that take the recipe's own processor seconds."""
    updates = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in dict.fromkeys(("as it is", *arms)):
            with curve_trainer(False), suppress(Started):
                merging.merge(recipe_of(plain, arm, steps=10**6, output=Path(folder) / arm), started)
            updates[arm] = CurveTrainer.latest.update
        seconds = medians(updates, repeats)
    return {arm: max(1, round(plain["steps"] * seconds["as it is"] / seconds[arm])) for arm in arms}


def best_blend(base: Path, teachers: Mapping[str, Adapter], items: int) -> tuple[float, ...]:
    """The linear blend's weights that close the two gaps best, on validation items."""
    evaluate = TestEvaluator(base, items, "val")
    scores = {name: evaluate.items(adapter) for name, adapter in (("base", None), *teachers.items())}

    def closed(weights: tuple[float, ...]) -> float:
        found = evaluate.items(blend(list(teachers.values()), list(weights)))
        shares = []
        for measure in CAPABILITIES:
            low, high = overall(scores["base"][measure]), overall(scores[measure][measure])
            shares.append((overall(found[measure]) - low) / (high - low))
        return min(shares)

    return max(itertools.product(WEIGHTS, repeat=2), key=closed)


def table(facts: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
    """Markdown: every arm against the teachers."""
    teachers, base = facts["teachers"], facts["base"]
    goals = {name: overall(teachers[name][name]) for name in CAPABILITIES}
    exact = teachers["editing"]["exact"]
    out = [
        f"`{facts['recipe']}`, {facts['items']} test prompts and as many edits; {facts['machine']}. The teachers: "
        f"generation {goals['generation']:.3f}, editing O {goals['editing']:.2f}, all facts right {overall(exact):.3f} "
        f"(base {overall(base['generation']):.3f}, {overall(base['editing']):.2f}, {overall(base['exact']):.3f}). "
        "Intervals: 95 %, seeds and items resampled, paired. Below: categories below the better teacher, the whole "
        "interval below 0. Diversity: share of the generation teacher's.",
        "",
        "| arm | seeds | steps | generation | editing O | all facts right | gap closed | below | diversity |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        runs = [line for line in lines if line["arm"] == arm]
        students = [run["scored"] for run in runs]
        cells = []
        for measure in (*CAPABILITIES, "exact"):
            goal = exact if measure == "exact" else teachers[measure][measure]
            mean, low, high = difference([one[measure] for one in students], goal)
            digits = 2 if measure == "editing" else 3
            cells.append(f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
        gaps = []
        for measure in CAPABILITIES:
            low, score = overall(base[measure]), np.mean([overall(one[measure]) for one in students])
            gaps.append(f"{100 * (score - low) / (goals[measure] - low):.0f}")
        diversity = np.mean([run["diversity"] for run in runs]) / facts["diversity"]
        worse = ", ".join(below(students, teachers)) or "none"
        out.append(
            f"| {arm} | {len(runs)} | {runs[0]['steps']} | {' | '.join(cells)} | {' / '.join(gaps)} % | {worse} | "
            f"{diversity:.2f} |"
        )
    return "\n".join(out) + "\n"


def main(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")] = Path("checkpoints/demo.yaml"),
    arms: Annotated[str, typer.Option(help=f"Of {'; '.join(ARMS)}: separated by semicolons.")] = ";".join(ARMS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 5,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first run.")] = 0,
    items: Annotated[int, typer.Option(min=6, help="Test prompts, and as many edits.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Timed updates of each arm.")] = 5,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .json and .jsonl.")] = "past",
) -> None:
    """Make and score the runs that are not finished yet, and write the table."""
    torch.set_num_threads(1)
    chosen = named(arms, ARMS)
    RESULTS.mkdir(exist_ok=True)
    path, facts_file = RESULTS / f"{name}.jsonl", RESULTS / f"{name}.json"
    facts: dict[str, Any] = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    if facts and (facts["recipe"], facts["items"]) != (str(recipe), items):
        raise typer.BadParameter(f"{facts_file} is of {facts['recipe']} and {facts['items']} items; give --name")
    plain = yaml.safe_load(recipe.read_text())
    base = base_folder(plain["base"])
    evaluate, console = TestEvaluator(base, items), Console()
    teachers = {c: read_adapter(Recipe(**plain).teachers[n].adapter, empty_transformer(base))
                for n, c in enumerate(CAPABILITIES)}  # fmt: skip
    if not facts:
        facts |= {"recipe": str(recipe), "items": items, "machine": f"{describe_machine()}, torch {torch.__version__}"}
        facts["base"] = evaluate.items(None)
        facts["teachers"] = {c: evaluate.items(adapter) for c, adapter in teachers.items()}
        facts["diversity"] = evaluate.diversity(teachers["generation"])
    if missing := [arm for arm in chosen if arm not in facts.setdefault("steps", {})]:
        facts["steps"] |= steps_of(plain, missing, repeats)
    facts_file.write_text(json.dumps(facts) + "\n")

    def keep(arm: str, seed: int, adapter: Adapter, steps: int, seconds: float) -> None:
        line = {"arm": arm, "seed": seed, "steps": steps, "seconds": round(seconds, 1)}
        line |= {"diversity": evaluate.diversity(adapter), "scored": evaluate.items(adapter)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        means = ", ".join(f"{measure} {overall(scores):.3f}" for measure, scores in line["scored"].items())
        console.print(f"{arm}, seed {seed}, {steps} steps, {seconds:.0f} s: {means}", highlight=False)
        (RESULTS / f"{name}.md").write_text(table(facts, read_lines(path)))

    done = {(line["arm"], line["seed"]) for line in read_lines(path)}
    if not any(arm.startswith("blend") for arm, _ in done):
        weights = best_blend(base, teachers, min(items, 192))
        keep(f"blend {weights[0]:g} + {weights[1]:g}", 0, blend(list(teachers.values()), list(weights)), 0, 0.0)
    for seed, arm in itertools.product(range(first, first + seeds), chosen):
        if (arm, seed) in done:
            continue
        began, steps = time.process_time(), facts["steps"][arm]
        folder = RUNS / f"{name}-{arm.replace(' ', '-').replace(',', '')}-{seed}"
        fields = {"seed": seed, "steps": steps, "save_every": min(100, steps), "output": folder}
        student = merging.merge(recipe_of(plain, arm, **fields), lambda metrics, steps: None)
        keep(arm, seed, read_adapter(student.folder, empty_transformer(base)), steps, time.process_time() - began)
        shutil.rmtree(folder)
    (RESULTS / f"{name}.md").write_text(table(facts, read_lines(path)))


if __name__ == "__main__":
    typer.run(main)
