"""Walks of every family's tiny pipelines, for the tests of recorded walks on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tinies import TINYS
from tiny import random_adapter, random_image

from danceopd.backbone import Backbone
from danceopd.captured import CapturedField
from danceopd.fields import MergedField
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.family import as_it_is
from danceopd.rollout import rollout
from danceopd.steady import anew

_LISTED = [(i, tiny, task) for i, tiny in enumerate(TINYS) for task in tiny.tasks]
CASES = [(tiny, task) for _, tiny, task in _LISTED]
NAMES = [f"{tiny.family}{'+' * (i > 0 and TINYS[i - 1].family == tiny.family)} {task}" for i, tiny, task in _LISTED]
WORDS = {
    "generation": ["a red circle", "two blue square on the left", "a white ring"],
    "editing": ["make it red", "remove the blue star above", "add a ring"],
}
MORE = " and a green star in the top right corner, with a cross"


@dataclass
class World:
    """A backbone with a student whose A and B may change, our pipeline over it, and conditions of three rows."""

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
        """Other prompts, one of them as long as it may be, and other sources."""
        words, limit = WORDS[self.task][::-1], self.ours.family.prompt_limit(self.ours.pipe, self.ours.call)
        long = words[0] + MORE
        while max(self.ours.family.prompt_lengths(self.ours.pipe, [long])) > limit:
            long = long[:-1]
        return self.conditions(7, [long, *words[1:]])

    def noise(self, *seeds: int) -> torch.Tensor:
        return self.ours.noise(list(seeds)).to(self.device)

    @torch.no_grad()
    def update(self, seed: int) -> None:
        """What an optimizer's step does: other numbers in the same parameters."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.backbone.parameters("student"):
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))


def world(tiny: Any, task: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> World:
    family, pipe = FAMILIES[tiny.family], tiny.build()
    pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)
    backbone = Backbone(pipe.transformer, family)
    adapter = random_adapter(pipe.transformer, targets=family.lora_targets, size=0.1)
    backbone.add_adapter("student", adapter, trainable=True)
    if task == "generation":
        return World(backbone, GenerationPipeline(pipe, family, tiny.call), task, device)
    return World(backbone, EditingPipeline(tiny.editing(pipe), family, tiny.call), task, device)


def afresh(field: Any) -> Any:
    """The field, computing everything at every step, as a recording does."""

    def ask(x: torch.Tensor, sigma: torch.Tensor, condition: Any) -> torch.Tensor:
        with anew():
            return field(x, sigma, condition)

    return ask


def still(field: MergedField) -> Any:
    """The field as it is recorded, which for uneven prompts may be padded."""
    return afresh(lambda x, sigma, condition: field(x, sigma, FAMILIES[condition.family].still(condition)))


def walks(one: World, recorder: Any) -> tuple[list[Any], CapturedField]:
    """(recorded, the same without recording, stock) states of ragged walks, across updates, prompts and sources."""
    field = MergedField(one.backbone, "student")
    recorded = CapturedField(field, recorder, after=1)
    sigmas, found = one.ours.sigmas(), []
    first, others = one.conditions(), one.others()
    plan = [(first, [1, 2, 3], [3, 1, 3]), (others, [4, 5, 6], [1, 3, 3]), (first, [7, 8, 9], [3, 1, 2])]
    for turn, (condition, seeds, stops) in enumerate(plan):
        stop = torch.tensor(stops)
        stock = [afresh(field)] if one.backbone.family.still is as_it_is else [afresh(field), still(field)]
        walk = [rollout(f, one.noise(*seeds), sigmas, stop, condition) for f in (recorded, *stock)]
        found.append((walk[0], walk[-1], walk[1]))
        one.update(turn)
    return found, recorded
