"""Which recipe is best: merges every combination of some recipe values and scores the students on validation items.

    python benchmarks/recipes.py checkpoints/demo.yaml --vary query.law=paper,high-noise --vary rollout.steps=5,8

Every combination of the `--vary` values is merged from each seed, and scored in latent space, without the decoder:
final latents are read back into scenes cell by cell, prompts are scored by the suite's own checker, an edit is correct
when the whole scene is. The base, the teachers and their linear merges are in the same table. Validation split only;
`danceopd bench --suite scenes` scores the test split.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from danceopd.adapters.blend import blend
from danceopd.adapters.read import read_adapter
from danceopd.common.system import describe_machine
from danceopd.merge import merge
from danceopd.models.base import base_folder, empty_transformer, load_base
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe
from danceopd.worlds.scenes.edits import edits
from danceopd.worlds.scenes.prompts import prompts
from danceopd.worlds.scenes.score import judge
from danceopd.worlds.toy.batches import Batches, Mix
from danceopd.worlds.toy.codes import CellTable
from danceopd.worlds.toy.flow import sample

RESULTS = Path(__file__).parent / "results"


class LatentEvaluator:
    """Scores of adapters on one base, on the same validation items from the same noise, read from latents."""

    def __init__(self, base: Path, items: int) -> None:
        pipe = load_base(base)
        self.transformer, self.table = pipe.transformer.requires_grad_(False), CellTable(pipe.vae)
        texts = Batches(pipe, self.table, Mix({}, {}, 1.0), 1, 0)
        self.prompts, self.edits = prompts("val", items), edits("val", items)
        self.prompt_texts = texts.text([p.prompt for p in self.prompts])
        self.instruction_texts = texts.text([e.instruction for e in self.edits])
        self.sources = self.table.encode([e.source for e in self.edits])

    @torch.no_grad()
    def __call__(self, adapter: Adapter | None) -> tuple[float, float]:
        """Mean over categories of (correct pictures, edits whose whole scene is correct), each in [0, 1]."""
        layers = {name: self.transformer.get_submodule(name) for name in (adapter.tensors if adapter else ())}
        pristine = {name: layer.weight.clone() for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight += adapter.delta(name)  # type: ignore[union-attr]
        try:
            generated = self.table.read(sample(self.transformer, self.prompt_texts, seed=1))
            edited = self.table.read(sample(self.transformer, self.instruction_texts, self.sources, seed=1))
        finally:
            for name, layer in layers.items():
                layer.weight.copy_(pristine[name])
        correct, exact = defaultdict(list), defaultdict(list)
        for prompt, scene in zip(self.prompts, generated, strict=True):
            correct[prompt.tag].append(judge(prompt, scene.things).correct)
        for edit, scene in zip(self.edits, edited, strict=True):
            exact[edit.task_type].append(scene.key() == edit.target.key())
        return _macro(correct), _macro(exact)


def _macro(by_category: dict[str, list[bool]]) -> float:
    """Mean over categories of the share that is true."""
    return statistics.mean(sum(found) / len(found) for found in by_category.values())


def main(
    recipe: Annotated[Path, typer.Argument(help="The recipe to start from.")] = Path("checkpoints/demo.yaml"),
    vary: Annotated[
        list[str] | None, typer.Option(help="Values to try, recipe.key=value,value,...; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Merges of each combination, from seeds 0, 1, ...")] = 1,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts, and as many edits.")] = 384,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md.")] = "recipes",
) -> None:
    """Merge every combination, score it, and write the table."""
    plain = yaml.safe_load(recipe.read_text())
    pairs = [text.partition("=") for text in vary or ()]
    grid = [(key, [yaml.safe_load(value) for value in values.split(",")]) for key, _, values in pairs]
    first = Recipe(**plain)
    base = base_folder(first.base)
    score = LatentEvaluator(base, items)
    teachers = {t.name: read_adapter(t.adapter, empty_transformer(base)) for t in first.teachers if t.adapter != "base"}
    rows = [("base", "", *score(None)), *((f"{n} teacher", "", *score(a)) for n, a in teachers.items())]
    for weight in (0.5, 0.7, 1.0):
        merged = blend(list(teachers.values()), [weight] * len(teachers))
        rows.append((f"linear merge, {weight:g} each", "", *score(merged)))
    console = Console()
    for row in rows:
        console.print(*row)
    for values in itertools.product(*(options for _, options in grid)):
        setting = dict(zip((key for key, _ in grid), values, strict=True))
        found, seconds = [], []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                fields = _changed(plain, setting) | {"seed": seed, "output": folder}
                began = time.monotonic()
                student = merge(Recipe(**fields), report=lambda metrics, steps: None)
                seconds.append(time.monotonic() - began)
                found.append(score(read_adapter(student.folder)))
        label = ", ".join(f"{key} {value}" for key, value in setting.items()) or "the recipe itself"
        means = [statistics.mean(column) for column in zip(*found, strict=True)]
        rows.append((label, f"{statistics.median(seconds):.0f}", *means))
        console.print(*rows[-1])
    _write(name, recipe, rows, seeds, items)


def _changed(plain: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with other values by dotted key."""
    fields = yaml.safe_load(yaml.safe_dump(plain))
    for key, value in setting.items():
        *parents, name = key.split(".")
        part = fields
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return fields


def _write(name: str, recipe: Path, rows: list[tuple], seeds: int, items: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"`{recipe}`, {seeds} seed(s), {items} validation prompts and as many edits; {describe_machine()}, "
        f"torch {torch.__version__}.",
        "",
        "| | seconds | generation | editing, exact |",
        "|---|---|---|---|",
        *(f"| {label} | {seconds} | {correct:.3f} | {exact:.3f} |" for label, seconds, correct, exact in rows),
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
