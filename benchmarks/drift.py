"""Does a model that learns from itself drift into its own blind spots? Generations of self-training, arm by arm.

    python benchmarks/drift.py                                  # 8 generations of every arm, 3 seeds, then the page
    python benchmarks/drift.py --arms "ranked, anchored" --seeds 1

Generation 0 is a student of the shipped teachers. Each generation is a merge whose teacher is the generation before,
on one pool of prompts and source images without labels. After each it is scored on validation items that nothing
trains on: exact scores, pass@8, diversity, what prompts leave open, how well the signal still ranks (AUC), and how much
more the signal believes than is true. The monitor checks every generation as it would for a user without labels: its
judge is a frozen model. Finished generations are kept; it can be interrupted and started again.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from past import Scored, TestEvaluator, overall
from PIL import Image
from quality import CurveTrainer, Started, curve_trainer, merging, named, read_lines, started
from rich.console import Console

from danceopd.adapters.read import read_adapter
from danceopd.bench.suites.scenes import render_image
from danceopd.common.shipped import shipped
from danceopd.engine.rollout import rollout
from danceopd.labelfree.audit.figures import concordance, figure
from danceopd.labelfree.monitor import Monitor, MonitorCallback
from danceopd.labelfree.rewards import Group, Reward, likelihood
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.fields import unguided
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe
from danceopd.run.plots import curves
from danceopd.worlds.scenes.edits import TASKS, draw_edit
from danceopd.worlds.scenes.prompts import TAGS, draw_prompt

RESULTS = Path(__file__).parent / "results"
POOL = 240
"""Prompts, and edits, of the pool that every generation trains on."""
QUESTIONS, PICTURES = 48, 8
"""Prompts that are answered so many times for pass@8, the signal's AUC and what it believes."""
FIRST = {"generation": shipped("generation"), "editing": shipped("editing")}
NFT = {"group": 6, "round": 12, "reuse": 3, "rewards": {"likelihood": 1.0}}
CONTRAST = {"reference": "base", "weight": 0.5}

Arm = Callable[[Path, Path], dict[str, Any]]
"""(the adapter of the generation before, the folder with its own pictures) -> the recipe's changes."""


def _teachers(*adapters: tuple[str, Path | str]) -> list[dict[str, Any]]:
    """Each adapter as a teacher of both capabilities."""
    return [
        {"name": f"{name}-{capability}", "adapter": str(path), "capability": capability}
        for name, path in adapters
        for capability in FIRST
    ]


def _firsts() -> list[dict[str, Any]]:
    return [{"name": f"first-{c}", "adapter": str(path), "capability": c} for c, path in FIRST.items()]


def _moved(names: list[dict[str, Any]]) -> dict[str, Any]:
    return {teacher["name"]: CONTRAST for teacher in names}


def _contrast(before: Path, own: Path) -> dict[str, Any]:
    mine = _teachers(("before", before))
    return {"teachers": mine, "contrast": _moved(mine)}


def _ranked(before: Path, own: Path) -> dict[str, Any]:
    return {"teachers": _teachers(("before", before)), "objective": "nft", "nft": NFT}


def _both(before: Path, own: Path) -> dict[str, Any]:
    return _contrast(before, own) | {"objective": "nft", "nft": NFT | {"share": 0.5}}


def _anchored(arm: Arm) -> Arm:
    """Half of the rows learn from the first teachers; of ranked samples, half of the loss, and the first teachers rank.
    """

    def changes(before: Path, own: Path) -> dict[str, Any]:
        found = arm(before, own)
        if "nft" not in found:
            return found | {"teachers": found["teachers"] + _firsts()}
        firsts = _firsts()
        moved = {"contrast": _moved(firsts)} if "contrast" in found else {}
        return found | {"teachers": firsts, "nft": NFT | {"share": 0.5}} | moved

    return changes


def _own_pictures(before: Path, own: Path) -> dict[str, Any]:
    data = {c: str(own / f"{c}.jsonl") for c in FIRST}
    return {"teachers": _teachers(("before", before)), "objective": "supervised", "rollout": None, "data": data}


ARMS: dict[str, Arm] = {
    "replace": _own_pictures,
    "accumulate": _own_pictures,
    "contrast": _contrast,
    "contrast, anchored": _anchored(_contrast),
    "ranked": _ranked,
    "ranked, anchored": _anchored(_ranked),
    "both": _both,
    "both, anchored": _anchored(_both),
}
"""Own pictures are those of the generation before (replace), or of all before and the first teachers (accumulate)."""


def write_pool(folder: Path) -> None:
    """Prompts and edits of the training split without an answer: generation.jsonl, editing.jsonl and source images.

    Others for each name of a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, prompts, edits = random.Random(f"drift/{folder.name}"), [], []
    while len(prompts) < POOL:
        prompt = draw_prompt(drawn, TAGS[len(prompts) % len(TAGS)])
        if prompt.scene.split() == "train":
            prompts.append({"prompt": prompt.prompt})
    while len(edits) < POOL:
        edit = draw_edit(drawn, TASKS[len(edits) % len(TASKS)], split="train")
        if edit is not None:
            source = f"source-{len(edits):03}.png"
            render_image(edit.source).save(folder / source)
            edits.append({"instruction": edit.instruction, "source": source})
    _write(folder / "generation.jsonl", prompts)
    _write(folder / "editing.jsonl", edits)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class World:
    """Draws and measures students: exact scores on validation items, and what the label-free signals say of them."""

    def __init__(self, folder: Path, items: int) -> None:
        self.base, self.pool = base_folder("base"), folder / "pool"
        probes = folder / "probes"  # rows that nothing trains on
        for place in (self.pool, probes):
            if not (place / "editing.jsonl").is_file():
                write_pool(place)
        self.scorer = TestEvaluator(self.base, items, "val")
        with tempfile.TemporaryDirectory() as temporary, curve_trainer(False), suppress(Started):
            changes = {"teachers": _firsts(), "monitor": {"every": 10**6, "prompts": 48}}
            changes["data"] = {c: str(probes / f"{c}.jsonl") for c in FIRST}
            recipe = self.recipe(changes, 0, 10**6, Path(temporary) / "run")
            merging.merge(recipe, started)
        self.trainer = CurveTrainer.latest
        monitor = next(one for one in self.trainer.callbacks if isinstance(one, MonitorCallback)).monitor
        assert monitor is not None
        self.probes, self.judge, self.options = monitor.probes, monitor.judge, recipe.monitor
        field = next(teacher.field for teacher in self.trainer.teachers if teacher.name == "first-generation")
        self.reward: Reward = likelihood(unguided(field))
        self.limit: float | None = None

    def recipe(self, changes: Mapping[str, Any], seed: int, steps: int, output: Path, **fields: Any) -> Recipe:
        """A merge of `steps` updates on the pool with an arm's changes."""
        usual: dict[str, Any] = {
            "base": "base", "seed": seed, "steps": steps, "batch": 24, "output": output, "ema": 0.98,
            "save_every": steps,
            "student": {"rank": 80, "init": "blend", "init_weights": {"first-generation": 0.7, "first-editing": 0.9}},
            "optimizer": {"lr": 5e-4, "warmup": 5, "schedule": "cosine"}, "rollout": {"steps": 5}, "keep_last": 1,
            "data": {c: str(self.pool / f"{c}.jsonl") for c in FIRST}, "validation": {"every": 0},
            "samples": {"every": 0, "count": 1}, "monitor": {"every": 0},
        }  # fmt: skip
        merged = usual | dict(changes) | fields
        if merged.get("objective", "danceopd") == "danceopd":
            merged["query"] = {"law": "high-noise"}
        return Recipe(**{key: value for key, value in merged.items() if value is not None})

    def draw(self, adapter: Adapter, capability: str, seed: int) -> list[Image.Image]:
        """The student's picture of every row of the pool."""
        n = 0 if capability == "generation" else 1
        pipeline = self.scorer.parts[0][1][n][0]
        rows = read(self.pool / f"{capability}.jsonl")
        if n:
            sources = [Image.open(self.pool / row["source"]).convert("RGB") for row in rows]
            condition = pipeline.conditions([row["instruction"] for row in rows], sources)
        else:
            condition = pipeline.conditions([row["prompt"] for row in rows])
        ends = torch.full((len(rows),), len(pipeline.sigmas()) - 1)
        noise = pipeline.noise([seed * POOL + i for i in range(len(rows))])
        with self.scorer.merged(adapter) as field:
            return pipeline.images(rollout(field, noise, pipeline.sigmas(), ends, condition))

    def add_pictures(self, folder: Path, drawn: Mapping[str, list[Image.Image]], tag: str) -> None:
        """Write pictures as the targets of the pool's rows, beside those that are there."""
        folder.mkdir(parents=True, exist_ok=True)
        for capability, pictures in drawn.items():
            path = folder / f"{capability}.jsonl"
            rows = [row for row in (read(path) if path.is_file() else []) if f"-{tag}-" not in row["target"]]
            asked = read(self.pool / f"{capability}.jsonl")
            for number, (row, picture) in enumerate(zip(asked, pictures, strict=True)):
                name = f"{capability}-{tag}-{number:03}.png"
                picture.save(folder / name)
                if "source" in row:
                    row = row | {"source": str(self.pool / row["source"])}
                rows.append(row | {"target": name})
            _write(path, rows)

    def measure(self, adapter: Adapter) -> dict[str, Any]:
        """All figures of one student but the monitor's."""
        scored: Scored = self.scorer.items(adapter)
        suite, tasks = self.scorer.parts[0]
        pipeline, items, condition = tasks[0]
        some = list(range(min(QUESTIONS, len(items))))
        rows = [row for row in some for _ in range(PICTURES)]
        ends = torch.full((len(rows),), len(pipeline.sigmas()) - 1)
        noise = pipeline.noise([10**6 + i for i in range(len(rows))])
        with self.scorer.merged(adapter) as field:
            clean = rollout(field, noise, pipeline.sigmas(), ends, condition.rows(rows))
        scores = suite.score([items[row] for row in rows], pipeline.images(clean))
        right = np.array([score.correct for score in scores]).reshape(len(some), PICTURES)
        groups = [Group(clean[i * PICTURES : (i + 1) * PICTURES], condition.rows([i]), i) for i in some]
        believed = self.reward(groups).numpy()
        if self.limit is None:  # of generation 0: the signal then believes as many pictures as are right
            self.limit = float(np.quantile(believed, 1 - right.mean()))
        ranked = figure(concordance(believed, right.astype(float)))
        open_factors = suite.summarise(scores)["generation"]["diversity"]
        return {
            "generation": overall(scored["generation"]),
            "editing": overall(scored["editing"]),
            "exact": overall(scored["exact"]),
            "worst category": min(float(np.mean(values)) for values in scored["generation"].values()),
            "pass@8": float(right.any(1).mean()),
            "diversity": self.scorer.diversity(adapter),
            "total variation": float(np.mean([found["distance"] for found in open_factors.values()])),
            "AUC": None if ranked is None else ranked["mean"],
            "confidence - accuracy": float((believed >= self.limit).mean() - right.mean()),
            "limit": self.limit,
        }


def run_arm(world: World, arm: str, seed: int, generations: int, steps: int, folder: Path, path: Path) -> None:
    """The generations of an arm that are not done yet, a line each."""
    done = {line["round"]: line for line in read_lines(path) if (line["arm"], line["seed"]) == (arm, seed)}
    place = folder / f"{arm.replace(', ', '-')}-{seed}"
    start = folder / f"start-{seed}"
    if not (start / "pytorch_lora_weights.safetensors").is_file():
        recipe = world.recipe({"teachers": _firsts()}, seed, 100, start)
        merging.merge(recipe, lambda metrics, steps: None)
    monitor = Monitor(world.options, world.probes, world.judge)
    world.limit = done[0]["limit"] if done else None
    for generation in range(generations + 1):
        output = start if generation == 0 else place / f"generation-{generation}"
        began = time.process_time()
        if generation and not (output / "pytorch_lora_weights.safetensors").is_file():
            before, own = start if generation == 1 else place / f"generation-{generation - 1}", place / "own"
            if arm in ("replace", "accumulate"):
                if arm == "replace":
                    own = place / f"own-{generation}"
                elif generation == 1:
                    firsts = {c: world.draw(_adapter(world, shipped(c)), c, seed) for c in FIRST}
                    world.add_pictures(own, firsts, "first")
                mine = _adapter(world, before)
                tag, noise = f"{generation:02}", 1000 * seed + generation
                world.add_pictures(own, {c: world.draw(mine, c, noise) for c in FIRST}, tag)
            changes = ARMS[arm](before, own) | {"student": {"rank": 80, "init": str(before)}}
            merging.merge(
                world.recipe(changes, 100 * seed + generation, steps, output), lambda metrics, steps: None
            )
        adapter = _adapter(world, output)
        monitor.check(generation, world.trainer.ema_field(adapter))
        if generation in done:
            continue
        line = {"arm": arm, "seed": seed, "round": generation, "steps": steps} | world.measure(adapter)
        line |= {"alarms": monitor.alarms, "seconds": round(time.process_time() - began, 1)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        Console().print(
            f"{arm}, seed {seed}, generation {generation}: generation {line['generation']:.3f}, editing "
            f"{line['editing']:.2f}, alarms {len(monitor.alarms)}",
            highlight=False,
        )


def _adapter(world: World, folder: Path | str) -> Adapter:
    return read_adapter(folder, empty_transformer(world.base))


FIGURES = ("generation", "editing", "exact", "worst category", "pass@8", "diversity", "total variation", "AUC",
           "confidence - accuracy")  # fmt: skip


def page(lines: list[dict[str, Any]], folder: Path, name: str) -> str:
    """Markdown: the last generation against the first, when the score turned and when the monitor rang; curves."""
    out = [
        "| arm | seeds | " + " | ".join(FIGURES) + " | best generation | first alarm |",
        "|---|--:|" + "--:|" * (len(FIGURES) + 2),
    ]
    series: dict[str, dict[str, list[float]]] = {kind: {} for kind in FIGURES}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        mine = [line for line in lines if line["arm"] == arm]
        by = {seed: sorted((one for one in mine if one["seed"] == seed), key=lambda one: one["round"])
              for seed in dict.fromkeys(one["seed"] for one in mine)}  # fmt: skip
        last = min(run[-1]["round"] for run in by.values())
        cells = []
        for kind in FIGURES:
            values = [[run[g][kind] for run in by.values() if run[g][kind] is not None] for g in range(last + 1)]
            means = [float(np.mean(one)) if one else float("nan") for one in values]
            series[kind][arm] = means
            cells.append(f"{means[0]:.3f} → {means[-1]:.3f}")
        best = ", ".join(str(int(np.argmax([turning(line) for line in run]))) for run in by.values())
        rung = ", ".join(str(next((one["round"] for one in run if one["alarms"]), "-")) for run in by.values())
        out.append(f"| {arm} | {len(by)} | {' | '.join(cells)} | {best} | {rung} |")
    for kind, found in series.items():
        length = min(map(len, found.values()))
        shown = {arm: values[:length] for arm, values in found.items()}
        picture = curves(list(range(length)), shown, caption=f"generation of self-training; {kind}", log=False)
        (folder / f"{name}-{kind.replace(' ', '').replace('@', '')}.png").write_bytes(picture)
    return "\n".join(out) + "\n"


def turning(line: Mapping[str, Any]) -> float:
    """The exact score whose best generation is where a run turned: both capabilities, each over its whole scale."""
    return line["generation"] + line["editing"] / 10


def main(
    arms: Annotated[str, typer.Option(help=f"Of {'; '.join(ARMS)}: separated by semicolons.")] = ";".join(ARMS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    generations: Annotated[int, typer.Option(min=1, help="Of self-training, after the first student.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Updates of a generation.")] = 48,
    items: Annotated[int, typer.Option(min=48, help="Validation prompts, and as many edits.")] = 192,
    folder: Annotated[Path, typer.Option(help="Where the students and their pictures are kept.")] = Path("drift"),
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .jsonl and pictures.")] = "drift",
) -> None:
    """Train and measure the generations that are not done yet, and write the page."""
    torch.set_num_threads(1)
    chosen = named(arms, ARMS)
    RESULTS.mkdir(exist_ok=True)
    path, world = RESULTS / f"{name}.jsonl", World(folder.resolve(), items)
    for seed, arm in itertools.product(range(seeds), chosen):
        run_arm(world, arm, seed, generations, steps, folder.resolve(), path)
        (RESULTS / f"{name}.md").write_text(page(read_lines(path), RESULTS, name))


if __name__ == "__main__":
    typer.run(main)
