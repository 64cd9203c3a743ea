"""Rollouts of every family's tiny pipelines, for the tests of CUDA graphs and of the kernel trial, on CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tinies import TINYS
from tiny import random_adapter, random_image

from danceopd.engine.rollout import rollout
from danceopd.models.backbone import Backbone
from danceopd.models.cuda_graphs import CapturedField
from danceopd.models.fields import MergedField
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.family import unchanged_condition
from danceopd.pipelines.registry import FAMILIES

_LISTED = [(i, tiny, task) for i, tiny in enumerate(TINYS) for task in tiny.tasks]
CASES = [(tiny, task) for _, tiny, task in _LISTED]
NAMES = [f"{tiny.family}{'+' * (i > 0 and TINYS[i - 1].family == tiny.family)} {task}" for i, tiny, task in _LISTED]
WORDS = {
    "generation": ["a red circle", "two blue square on the left", "a white ring"],
    "editing": ["make it red", "remove the blue star above", "add a ring"],
}
LONGER = " and a green star in the top right corner, with a cross"


@dataclass
class RolloutCase:
    """A backbone with a student LoRA, a pipeline over it, and conditions of three rows."""

    backbone: Backbone
    ours: Any
    task: str
    device: str

    def conditions(self, seed: int = 0, words: list[str] | None = None) -> Any:
        words = words or WORDS[self.task]
        if self.task == "generation":
            return self.ours.conditions(words).to(self.device)
        return self.ours.conditions(words, [random_image(seed + i) for i in range(len(words))]).to(self.device)

    def others(self) -> Any:
        """Other prompts, one of them as long as the family allows, and other source images."""
        words, limit = WORDS[self.task][::-1], self.ours.family.prompt_limit(self.ours.pipe, self.ours.call)
        long = words[0] + LONGER
        while max(self.ours.family.prompt_lengths(self.ours.pipe, [long])) > limit:
            long = long[:-1]
        return self.conditions(7, [long, *words[1:]])

    def noise(self, *seeds: int) -> torch.Tensor:
        return self.ours.noise(list(seeds)).to(self.device)

    @torch.no_grad()
    def update(self, seed: int) -> None:
        """Like an optimizer step: other numbers in the same parameters."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.backbone.parameters("student"):
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))


def rollout_case(tiny: Any, task: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> RolloutCase:
    family, pipe = FAMILIES[tiny.family], tiny.build()
    pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)
    backbone = Backbone(pipe.transformer, family)
    adapter = random_adapter(pipe.transformer, targets=family.lora_targets, size=0.1)
    backbone.add_adapter("student", adapter, trainable=True)
    if task == "generation":
        return RolloutCase(backbone, GenerationPipeline(pipe, family, tiny.call), task, device)
    return RolloutCase(backbone, EditingPipeline(tiny.editing(pipe), family, tiny.call), task, device)


def sync_free(field: MergedField) -> Any:
    """The field as it is captured: for prompts of different lengths it may be padded."""
    return lambda x, sigma, condition: field(x, sigma, FAMILIES[condition.family].sync_free(condition))


def rollouts(case: RolloutCase, graphs: Any) -> tuple[list[Any], CapturedField]:
    """States of ragged rollouts (captured, the same not captured, stock), across updates, prompts and sources."""
    field = MergedField(case.backbone, "student")
    captured = CapturedField(field, graphs, min_calls=1)
    sigmas, found = case.ours.sigmas(), []
    first, others = case.conditions(), case.others()
    plan = [(first, [1, 2, 3], [3, 1, 3]), (others, [4, 5, 6], [1, 3, 3]), (first, [7, 8, 9], [3, 1, 2])]
    for turn, (condition, seeds, stops) in enumerate(plan):
        stop = torch.tensor(stops)
        eager = [field]
        if case.backbone.family.sync_free not in (unchanged_condition, None):
            eager.append(sync_free(field))
        states = [rollout(f, case.noise(*seeds), sigmas, stop, condition) for f in (captured, *eager)]
        found.append((states[0], states[-1], states[1]))
        case.update(turn)
    return found, captured
