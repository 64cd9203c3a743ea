"""What a recipe hangs on its trainer besides plain distillation: one hook, with the callback that it may need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from danceopd.engine.callbacks import Callback, QueryHook
from danceopd.engine.teachers import RoutedTeacher
from danceopd.labelfree.gates.hook import GateHook
from danceopd.labelfree.nft.hook import OwnSamples, Rounds
from danceopd.models.backbone import Backbone
from danceopd.recipe.recipe import Recipe


def query_hook(
    recipe: Recipe, backbone: Backbone, teachers: Sequence[RoutedTeacher], device: torch.device,
    folder: Path | None = None,
) -> tuple[QueryHook | None, list[Callback]]:
    """The recipe's gates, or its ranked own samples; None without. The student is on the backbone already.

    `folder` is the run's, where this process writes."""
    if recipe.gates.on:
        kinds = [teacher.capability for teacher in recipe.teachers]
        steps = recipe.rollout.steps
        return GateHook(recipe.gates, teachers, kinds, device, seed=recipe.seed, rollout_steps=steps), []
    if recipe.objective == "nft":
        samples = OwnSamples(recipe, backbone, teachers)
        return samples, [Rounds(samples, folder)]
    return None, []
