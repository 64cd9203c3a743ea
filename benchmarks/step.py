"""Seconds of an update, and peak memory, compared with a trainer that works like the paper's released code.

    python benchmarks/step.py [--repeats 5] [--rows 16]

Tiny random SD3 and FLUX.2 pipelines of the stock classes (from the tests) and the shipped model. The same samples an
update, the same 16 rollout steps, the paper's query law, fp32, one thread; the trainers take turns, and medians are
reported. Then the peak memory of a merge with 1, 2, 4 and 8 LoRA teachers on a FLUX.2 transformer of 46 million
parameters, each in a process of its own. Writes benchmarks/results/step.md.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from official import ReleasedOptions, ReleasedTeacher, ReleasedTrainer, copy_with

from danceopd.common.system import describe_machine
from danceopd.data.dataset import ConditionDataset
from danceopd.data.sources import edits_from
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_folder, load_base
from danceopd.models.fields import AdapterField, MergedField
from danceopd.models.lora import Adapter
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of
from danceopd.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from tiny import random_adapter, tiny_klein  # noqa: E402
from tiny_sd3 import tiny_sd3  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "step.md"
STEPS, ROWS, RANK = 16, 8, 32
WORDS = ["a red circle", "two blue square on the left", "a white ring", "a green star above"] * (ROWS // 4)
TIMES = """Median processor
seconds of an update, fp32, one thread, the trainers in turn; in brackets, how many times as fast as the released one
(benchmarks/official.py)."""
MEMORY = """Peak memory in MiB of a process that holds the transformer, so many LoRA teachers and the student (rank 8,
width 512), and has made one rollout step and one gradient. The released way holds a transformer for each teacher."""
HEAD = """# An update of {rows} samples, {steps} rollout steps, the paper's query law

`python benchmarks/step.py --repeats {repeats} --rows {rows}`: {machine}, torch {torch}. {times}
"""
WAYS = {
    "the released way": ReleasedOptions(),
    "+ encoded once": ReleasedOptions(encode_once=True),
    "+ stops at the query": ReleasedOptions(encode_once=True, stop_at_query=True),
    "+ rollout on W + BA": ReleasedOptions(encode_once=True, stop_at_query=True, merged_weights=True),
}


class Setup:
    """A pipeline, its conditions and its teachers, for both trainers."""

    def __init__(self, pipe: Any, call: dict[str, Any], edits: bool) -> None:
        self.family, self.pipe = family_of(pipe), pipe
        self.draw = GenerationPipeline(pipe, self.family, {**call, "num_inference_steps": STEPS})
        self.sigmas = self.draw.sigmas()
        self.conditions = {"generation": self.draw.conditions(WORDS)}
        self.encode = {"generation": lambda row: self.draw.conditions([WORDS[row]])}
        if edits:
            edit = EditingPipeline(pipe, self.family, {**call, "num_inference_steps": STEPS})
            pairs = list(edits_from("scenes", ROWS, 0))
            self.conditions["editing"] = edit.conditions([w for w, _ in pairs], [image for _, image in pairs])
            self.encode["editing"] = lambda row: edit.conditions([pairs[row][0]], [pairs[row][1]])
        else:
            self.conditions["second"], self.encode["second"] = self.conditions["generation"], self.encode["generation"]
        targets = self.family.lora_targets
        self.adapters = {
            name: random_adapter(pipe.transformer, rank=RANK, seed=i, size=0.01, targets=targets)
            for i, name in enumerate(self.conditions)
        }

    def released(self, batch: int, options: ReleasedOptions, rank: int = RANK) -> ReleasedTrainer:
        bare = self.pipe.transformer
        routes = [
            ReleasedTeacher(copy_with(bare, self.adapters[name], self.family), condition, self.encode[name])
            for name, condition in self.conditions.items()
        ]
        return ReleasedTrainer(copy_with(bare, Adapter({}), self.family), routes, self.sigmas, rank, batch, options)

    def ours(self, batch: int) -> Trainer:
        backbone = copy_with(self.pipe.transformer, Adapter({}), self.family)
        teachers = []
        for name, condition in self.conditions.items():
            backbone.add_adapter(name, self.adapters[name])
            field = MergedField(backbone, name) if backbone.merging_is_cheaper(name) else AdapterField(backbone, name)
            teachers.append(RoutedTeacher(name, field, ConditionDataset([(condition, self.sigmas)])))
        named = [{"name": n, "adapter": "generation", "capability": "generation"} for n in self.conditions]
        recipe = Recipe(teachers=named, steps=10**6, batch=batch, student={"rank": RANK}, rollout={"steps": STEPS})
        backbone.new_student(STUDENT, RANK)
        return Trainer(recipe, backbone, teachers, torch.device("cpu"))


def setups() -> dict[str, Setup]:
    shipped = load_base(base_folder("base"))
    return {
        "tiny SD3": Setup(tiny_sd3(), {"height": 64, "width": 64, "max_sequence_length": 40}, edits=False),
        "tiny FLUX.2": Setup(tiny_klein(), {"height": 64, "width": 64, "max_sequence_length": 24}, edits=True),
        "the shipped model (2 M)": Setup(shipped, {"height": 64, "width": 64, "max_sequence_length": 32}, edits=True),
    }


def timed(setup: Setup, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of an update, by trainer."""
    ways = {name: setup.released(batch, options).update for name, options in WAYS.items()}
    trainer = setup.ours(batch)

    def update() -> None:
        trainer.train_step()
        trainer.step += 1

    return medians(ways | {"ours: + batched": update}, repeats)


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each way; the ways take turns, and the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:
                found[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def large() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=32, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=256, timestep_guidance_channels=64, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False,
    )  # fmt: skip


def occupy(teachers: int, released: bool) -> None:
    """Allocate what an update needs with so many teachers; prints MiB: the peak, the transformer's, an adapter's."""
    torch.manual_seed(0)
    transformer, pipe = large(), tiny_klein()
    family = family_of(pipe)
    own = sum(p.nbytes for p in transformer.parameters()) / 2**20
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 24}
    draw = GenerationPipeline(pipe, family, call)
    condition = draw.conditions(WORDS[:1])
    states = condition.kwargs["encoder_hidden_states"]
    condition.kwargs["encoder_hidden_states"] = states.repeat(1, 1, 6)[..., :256]
    backbone, x, sigma = Backbone(transformer, family), torch.randn(1, *condition.shape), torch.ones(1)
    copies = []
    for i in range(teachers):
        adapter = random_adapter(transformer, rank=8, seed=i, size=0.01, targets=family.lora_targets)
        if released:
            copies.append(copy_with(large(), adapter, family))
        else:
            backbone.add_adapter(f"t{i}", adapter)
    backbone.new_student(STUDENT, 8)
    with torch.no_grad(), backbone.merged(STUDENT):
        backbone.velocity(x, sigma, condition)
    with backbone.acting_as(STUDENT):
        backbone.velocity(x, sigma, condition).square().mean().backward()
    one = sum(a.nbytes + b.nbytes for a, b in adapter.tensors.values()) / 2**20
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, own, one)


def memory() -> list[str]:
    lines = []
    for teachers in (1, 2, 4, 8):
        row = []
        for way in ("ours", "released"):
            command = [sys.executable, __file__, "--occupy", f"{way}:{teachers}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, own, one = map(float, done.stdout.split())
            row.append(peak)
        lines.append(f"| {teachers} | {row[0]:.0f} | {row[1]:.0f} | {own:.0f} | {one:.1f} |")
    return lines


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Samples an update.")] = 16,
    occupied: Annotated[str, typer.Option("--occupy", hidden=True)] = "",
) -> None:
    """Time and measure, and write the tables."""
    torch.set_num_threads(1)
    if occupied:
        way, _, teachers = occupied.partition(":")
        return occupy(int(teachers), way == "released")
    found = {name: timed(setup, rows, repeats) for name, setup in setups().items()}
    first = next(iter(found.values()))
    facts = {"machine": describe_machine(), "torch": torch.__version__, "times": TIMES}
    lines = [
        HEAD.format(rows=rows, steps=STEPS, repeats=repeats, **facts),
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for way in first:
        cells = [f"{t[way]:.3f} ({t['the released way'] / t[way]:.1f}x)" for t in found.values()]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += ["", MEMORY, "", "| teachers | ours | released | the transformer alone | an adapter |", "|" + "---|" * 5]
    lines += memory()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
