"""A `Trainer` of two random adapters on a tiny FLUX.2 klein, and what tests do with one: batches, backward, train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.data.dataset import ConditionDataset, Dataset
from danceopd.engine.batches import Batch
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.objectives import RowLoss
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.labelfree.hooks import query_hook
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, VelocityField
from danceopd.models.lora import Adapter
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import record
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.recipe import Recipe

KLEIN = FAMILIES["flux2-klein"]
PROMPTS = ["a red circle", "a blue square", "two green stars", "a white ring"]
OTHER_PROMPTS = ["a circle red", "a square blue", "green stars two", "a ring white"]
LONGER_PROMPTS = [f"{prompt} on a white background" for prompt in PROMPTS]
NAMES = ("generation", "editing")


@dataclass
class TinyData:
    """Each teacher's four conditions, and by name the same rows under other conditions; their schedule."""

    conditions: dict[str, Condition]
    sigmas: torch.Tensor
    variants: dict[str, dict[str, Condition]] = field(default_factory=dict)
    null: Condition | None = None


def tiny_data(variants: bool = False) -> TinyData:
    """Four prompts and four edits; `variants`: with a null prompt and all that a gate may need."""
    pipe = tiny_klein()
    generation, editing = GenerationPipeline(pipe, KLEIN, CALL), EditingPipeline(pipe, KLEIN, CALL)
    images = [random_image(i) for i in range(4)]
    conditions = {"generation": generation.conditions(PROMPTS), "editing": editing.conditions(PROMPTS, images)}
    if not variants:
        return TinyData(conditions, generation.sigmas())
    degraded = [random_image(10 + i) for i in range(4)]
    other = {
        "generation": {
            "paraphrase 1": generation.conditions(OTHER_PROMPTS),
            "expanded": generation.conditions(LONGER_PROMPTS),
        },
        "editing": {
            "paraphrase 1": editing.conditions(OTHER_PROMPTS, images),
            "expanded": editing.conditions(LONGER_PROMPTS, images),
            "degraded blur": editing.conditions(PROMPTS, degraded),
        },
    }
    return TinyData(conditions, generation.sigmas(), other, null_prompt())


def null_prompt() -> Condition:
    """The empty prompt, one row."""
    how = {"height": 64, "width": 64, "num_inference_steps": 6, "max_sequence_length": 24}
    return record(tiny_klein(), KLEIN, prompt="", **how)[0]


def make_trainer(
    data: TinyData,
    files: Mapping[str, Any],
    *,
    teachers: Mapping[str, VelocityField] | None = None,
    datasets: Mapping[str, Dataset] | None = None,
    init: Adapter | None = None,
    rank: int = 0,
    world: int = 1,
    callbacks: Sequence[Callback] = (),
    **fields: Any,
) -> Trainer:
    """Two teachers on a fresh tiny backbone, with the hook that the recipe's `fields` ask for."""
    backbone, routed, cpu = Backbone(tiny_klein().transformer, KLEIN), [], torch.device("cpu")
    for i, name in enumerate(NAMES):
        backbone.add_adapter(name, random_adapter(backbone.transformer, seed=i, size=0.1))
        velocity = (teachers or {}).get(name) or AdapterField(backbone, name)
        dataset = (datasets or {}).get(name) or ConditionDataset([(data.conditions[name], data.sigmas)])
        other = {what: ConditionDataset([(c, data.sigmas)]) for what, c in data.variants.get(name, {}).items()}
        routed.append(RoutedTeacher(name, velocity, dataset, data.null, other))
    recipe = Recipe(**files, **{"steps": 6, "batch": 6, "student": {"rank": 8}, **fields})
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init)
    hook, parts = query_hook(recipe, backbone, routed, cpu)
    return Trainer(recipe, backbone, routed, cpu, rank, world, hook=hook, callbacks=[*parts, *callbacks])


def batches_of(trainer: Trainer) -> list[Batch]:
    """The batches of the trainer's next update."""
    draw = trainer.batches.draw(trainer.step)
    if trainer.hook is not None:
        trainer.hook.begin_step(trainer.step, draw)
    return list(trainer.batches.of(trainer.step, draw, trainer.hook))


def backward(trainer: Trainer, batch: Batch) -> list[RowLoss]:
    """Add a batch's gradient, as an update does; its row losses."""
    found = []
    for query in trainer.objective(batch, trainer.velocities):
        (query.loss.sum() / trainer.rows).backward()
        found.append(query.detach())
    return found


def train(trainer: Trainer, steps: int | None = None) -> list[StepMetrics]:
    """That many updates, all that are left by default; what each did."""
    record = Recorder()
    last, trainer.steps = trainer.steps, trainer.steps if steps is None else trainer.step + steps
    trainer.callbacks.append(record)
    try:
        trainer.train()
    finally:
        trainer.steps = last
        trainer.callbacks.remove(record)
    return record.metrics


def query_teachers(trainer: Trainer, wrap: Callable[[VelocityField], VelocityField]) -> list[VelocityField]:
    """Put other fields in place of the trainer's teachers; those before."""
    before = list(trainer.velocities.teachers)
    trainer.velocities = replace(trainer.velocities, teachers=[wrap(field) for field in before])
    return before


class Recorder(Callback):
    """Keeps what each update did."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)
