"""The memory of a planned merge, by part: what each part weighs, and while what it is held.

Weights count by their headers, activations by `flops.activation_bytes`, latents by a row of the stock pipeline's noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danceopd.adapters.read import adapter_shapes
from danceopd.common.tensors import DTYPES
from danceopd.models.flops import TokenCounts, activation_bytes
from danceopd.models.lora import Adapter
from danceopd.pipelines.family import Family
from danceopd.recipe.recipe import Recipe


def student_modules(
    recipe: Recipe, teachers: Mapping[str, tuple[Any, Adapter | None]], transformer: nn.Module, family: Family
) -> dict[str, nn.Linear]:
    """The layers that the student adapts: the family's targets, and those of what it starts as."""
    init = recipe.student.init
    if init == "blend":
        starts = [adapter for _, adapter in teachers.values()]
    elif init in teachers or init == "base":
        starts = [teachers[init][1]] if init in teachers else []
    else:
        starts = [adapter_shapes(init, transformer)]
    extra = {path for adapter in starts if adapter is not None for path in adapter.tensors}
    return {
        path: m
        for path, m in transformer.named_modules()
        if isinstance(m, nn.Linear) and (path in extra or re.fullmatch(family.lora_targets, path))
    }


def numbers(recipe: Recipe, modules: Mapping[str, nn.Linear]) -> int:
    return sum(recipe.student.rank * (m.in_features + m.out_features) for m in modules.values())


def memory(
    recipe: Recipe, folder: Path, family: Family, transformer: nn.Module,
    teachers: Mapping[str, tuple[dict[str, Any], Adapter | None]], modules: Mapping[str, nn.Linear],
    pictures: list[dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Bytes by part, and when they are held."""
    size, student = DTYPES[recipe.dtype].itemsize, 4 * numbers(recipe, modules)
    copy_ = size * sum(m.weight.numel() for m in modules.values())
    both = ["training", "checkpointed"]
    largest = max(pictures, key=lambda p: p["picture"] + p["source"])
    tokens = TokenCounts(largest["picture"], largest["source"], largest["text"])
    rows = min(recipe.batch, recipe.micro_batch or recipe.batch)
    kept = {c: rows * activation_bytes(transformer, tokens, size, c) for c in (False, True)}
    parts = [("backbone", size * sum(p.numel() for p in transformer.parameters()), ["encoding", *both])]
    if recipe.rollout.merged and recipe.objective in ("danceopd", "diffusionopd", "flowopd"):
        parts.append(("merged copy for rollouts", copy_, both))
    parts.append(("merged copy of the EMA", copy_, both))
    for name, (facts, _) in teachers.items():
        parts.append((f"teacher {name}", 4 * facts["parameters"], both))
    parts += [
        ("student", student, both),
        ("student, gradient", student, both),
        ("student, Adam", 2 * student, both),
        ("student, EMA", student, both),
        ("student, EMA on the backbone", student, both),
        ("student, EMA of the best validation", student * recipe.validation.exports_best, both),
        ("activations of the largest batch", kept[False], ["training"]),
        ("the same, gradient checkpointing", kept[True], ["checkpointed"]),
    ]
    for name, numel in _components(folder).items():
        if name in family.text_components:
            parts.append((f"{name}, which then leaves", size * numel, ["encoding"]))
        elif not name.startswith("transformer"):
            parts.append((name, size * numel, ["encoding", *both]))
    return [{"part": part, "bytes": int(number), "when": when} for part, number, when in parts if number]


def _components(folder: Path) -> dict[str, int]:
    """Numbers in each part's safetensors, by their headers; of several precisions, the plain files."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = sorted(part.glob("*.safetensors"))
        plain = [file for file in files if not re.search(r"\.(fp16|bf16|fp8\w*)\b", file.name)] or files
        for file in plain:
            with safe_open(str(file), framework="pt") as opened:
                shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118 - not a dict
            found[part.name] = found.get(part.name, 0) + sum(torch.Size(shape).numel() for shape in shapes)
    return found
