"""The memory of a planned run by part: what each part weighs, and in which of the run's phases it is held.

Weights count by their headers, activations by `models/flops.py`. In each phase some parts are held all the time, and of
the others, which come one after the other, the largest counts. On a GPU the base waits in the computer's memory while
prompts are encoded; on a CPU all is one memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from danceopd.common.parse import read_json
from danceopd.common.tensors import DTYPES
from danceopd.data.encode import prompts_at_once
from danceopd.models.backbone import may_copy_weights, merging_costs_less
from danceopd.models.cuda_graphs import MAX_GRAPHS
from danceopd.models.flops import activation_bytes, block_paths, forward_bytes
from danceopd.models.storage import bytes_of
from danceopd.planning.cards import CONTEXT, Card
from danceopd.planning.outline import Outline
from danceopd.recipe.checks import NO_ROLLOUT
from danceopd.recipe.recipe import Recipe

PHASES = ("encoding", "trial", "training", "samples", "export")
"""Prompts are encoded; the fused kernels are tried; updates; a sample grid is drawn; the student is written and proven.
"""
RUNNING = ("training", "samples")
PROCESS = 0.6e9
"""Bytes of Python, torch and diffusers, where the memory is the computer's."""
PROOF_ROWS = 4
"""Rows that an export is proven on."""
PIXEL_CHANNELS = 700
"""Numbers for each pixel that an autoencoder holds at the peak of decoding or encoding a picture."""
FRAMES = 4
"""Frames that the autoencoder of a video decodes at once."""
DEFAULT_ENCODER: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 0}
"""What a text encoder without a configuration is taken for."""


@dataclass(frozen=True)
class Part:
    """Bytes that are held in `phases`; `passing`: not all the time, so of such parts the largest of a phase counts."""

    name: str
    bytes: int
    phases: Sequence[str]
    passing: bool = False

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {"part": self.name, "bytes": self.bytes, "when": list(self.phases), "passing": self.passing}


def peak(parts: Sequence[Part], phase: str) -> int:
    """Bytes at the peak of a phase."""
    mine = [part for part in parts if phase in part.phases]
    held = sum(part.bytes for part in mine if not part.passing)
    return held + max((part.bytes for part in mine if part.passing), default=0)


def base_bytes(recipe: Recipe, run: Outline, part: str = "") -> int:
    """Bytes of the frozen base, or of a `part` of it (a module's path), as the recipe or its folder says it is kept."""
    size, transformer, kind = DTYPES[recipe.dtype].itemsize, run.transformer, run.kept(recipe)
    module = transformer.get_submodule(part)
    if run.stored_bytes is not None:  # a file says it
        share = sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in transformer.parameters())
        return int(share * run.stored_bytes)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)] if kind else []
    rest = sum(p.numel() for p in module.parameters()) - sum(m.weight.numel() for m in linears)
    return int(size * rest + sum(bytes_of(m, kind or "") for m in linears))


def student_numbers(recipe: Recipe, modules: Mapping[str, nn.Linear]) -> int:
    """Numbers of the student's A and B."""
    return sum(recipe.student.rank * (m.in_features + m.out_features) for m in modules.values())


def memory(recipe: Recipe, run: Outline, card: Card, world: int = 1) -> list[Part]:
    """The parts of a run whose recipe says nothing of `auto` any more; `world` processes share it."""
    size, transformer = DTYPES[recipe.dtype].itemsize, run.transformer
    sharded = recipe.parallel == "fsdp" and world > 1
    merged, kind = recipe.rollout.merged is True and not sharded, run.kept(recipe)
    weights, adapted = base_bytes(recipe, run), [m.weight.numel() for m in run.modules.values()]
    wait = [] if card.cuda else ["encoding"]  # the transformer is where the encoders are
    parts = [
        Part("CUDA context and workspaces", int(CONTEXT), PHASES)
        if card.cuda
        else Part("Python and libraries", int(PROCESS), PHASES),
        *_base(recipe, run, card, weights // (world if sharded else 1), wait),
    ]
    if kind:
        largest = max(m.weight.numel() for m in transformer.modules() if isinstance(m, nn.Linear))
        parts.append(Part("a layer of the backbone, dequantised", size * largest, ["trial", *RUNNING, "export"]))
    if merged:
        parts.append(Part("merged weights", size * sum(adapted), RUNNING))
        if size < 4:
            parts.append(Part("merging a layer", 4 * max(adapted), RUNNING, passing=True))
    parts += _adapters(recipe, run, size, merged, wait)
    parts += _activations(recipe, run, card, world, size)
    decoding = size * PIXEL_CHANNELS * max(2**20, *(p.size[0] * p.size[1] for p in run.pictures))
    decoding *= 1 if run.family.frames(run.pipe, run.call) == 1 else FRAMES
    for name, numel in run.components.items():
        if name in run.family.text_components:
            parts.append(Part(f"{name}, which then leaves", size * numel, ["encoding"]))
        elif not name.startswith("transformer"):
            parts.append(Part(name, size * numel, ["encoding"] if card.cuda else PHASES))
            decoding += size * numel * (card.cuda and name == "vae")  # it comes back to decode
    parts.append(Part("decoding a picture", decoding, ["samples"], passing=True))
    parts.append(Part("states of prompts and sources", _encoding(run, card, size), ["encoding"], passing=True))
    if card.cuda and recipe.kernels == "auto" and not (sharded or recipe.compile):
        parts.append(Part("the kernels' trial, in its own process", _trial(recipe, run, size), ["trial"], passing=True))
    return [part for part in parts if part.bytes]


def _base(recipe: Recipe, run: Outline, card: Card, weights: int, wait: Sequence[str]) -> list[Part]:
    """The base itself; of one that is offloaded what is outside of blocks, and the largest block, twice: the next is
    asked for before the last is given back. With a quantised base the export is also compared with the whole one."""
    after = ["trial", *RUNNING, "export"]
    blocks = [base_bytes(recipe, run, path) for path in block_paths(run.transformer)]
    full = DTYPES[recipe.dtype].itemsize * sum(p.numel() for p in run.transformer.parameters())
    if recipe.offload == "blocks" and card.cuda:
        return [Part("backbone, outside of its blocks", weights - sum(blocks), after),
                Part("backbone, two blocks at a time", 2 * max(blocks), after)]  # fmt: skip
    parts = [Part("backbone", weights, [*wait, *(["encoding"] * (run.saved == "nf4" and card.cuda)), *after])]
    if run.kept(recipe) and run.whole:
        share = (weights - sum(blocks) + 2 * max(blocks)) / weights if card.cuda else 1
        parts.append(Part("the base as it is stored, to compare the export", int(share * full), ["export"]))
    return parts


def _adapters(recipe: Recipe, run: Outline, size: int, merged: bool, wait: Sequence[str]) -> list[Part]:
    """Teachers and student, with all that learning keeps of it. Adapters are fp32, with a copy in the base's dtype."""
    parts, numbers = [], student_numbers(recipe, run.modules)
    both, student = 4 + (size if size < 4 else 0), 4 * numbers
    for name, adapter in run.adapters.items():
        if adapter is not None:
            parts.append(Part(f"teacher {name}", both * adapter.parameters, [*wait, "trial", *RUNNING]))
        contrast = recipe.contrast_of(next(teacher for teacher in recipe.teachers if teacher.name == name))
        if adapter is not None and contrast is not None and contrast.reference == "weaker":
            parts.append(Part(f"teacher {name}, weaker", both * adapter.parameters, [*wait, "trial", *RUNNING]))
    for one in run.teachers:
        if one.stacks and one.fast is not None:
            few = Part(f"fast.adapter on {one.teacher.name}", both * one.fast.parameters, [*wait, "trial", *RUNNING])
            parts.append(few)
    pairs = [(m.weight, recipe.student.rank) for m in run.modules.values()]
    layers = recipe.compile or recipe.gradient_checkpointing or not may_copy_weights(run.transformer)
    if merged and size == 4 and not layers and merging_costs_less(pairs):  # then it learns on merged weights, too
        parts.append(Part("weights merged to learn on", 8 * sum(w.numel() for w, _ in pairs), ["training"]))
    return [
        *parts,
        Part("student", student, RUNNING),
        Part("student, in the base's precision", both * numbers - student, RUNNING),
        Part("student, gradient", student, ["training"]),
        Part("student, Adam", 2 * student, RUNNING),
        Part("student, a step of Adam", student, ["training"], passing=True),
        Part("student, EMA", student, RUNNING),
        Part("student, EMA on the backbone", both * numbers, RUNNING),
        Part("student, the average that draws", both * numbers * (recipe.objective == "nft"), RUNNING),
        Part("student, EMA of the best validation", student * recipe.validation.exports_best, RUNNING),
        Part("student, read back", student, ["export"]),
    ]


def _activations(recipe: Recipe, run: Outline, card: Card, world: int, size: int) -> list[Part]:
    """Activations of the largest rows."""
    transformer, tokens, at_once = run.transformer, run.largest, recipe.rows_at_once
    rows = min(math.ceil(recipe.batch / world), at_once)
    kept = rows * activation_bytes(transformer, tokens, size, bool(recipe.gradient_checkpointing))
    forward = forward_bytes(transformer, tokens, size)
    parts = [
        Part("activations", kept, ["training"], passing=True),
        Part("activations of a grid", min(recipe.samples.count, at_once) * forward, ["samples"], passing=True),
        Part("activations of the proof", min(PROOF_ROWS, at_once) * forward, ["export"], passing=True),
    ]
    # of `auto` not counted: a graph that does not fit beside what the run needs is not captured
    rolled = recipe.rollout
    captured = rolled.cuda_graphs is True and rolled.merged and run.family.sync_free is not None
    if card.cuda and captured and recipe.objective not in NO_ROLLOUT:
        graphs = min(MAX_GRAPHS, rows * len(run.pictures))
        inputs = graphs * rows * size * tokens.all * _width(transformer)
        parts.append(Part("CUDA graphs: their pool and inputs", rows * forward + inputs, RUNNING))
    return parts


def _width(transformer: nn.Module) -> int:
    """Numbers of a token as the transformer gets it, at most: a prompt's states."""
    config: Any = transformer.config
    return int(config.get("joint_attention_dim") or config.get("cap_feat_dim") or config.get("text_dim") or 0)


def _encoding(run: Outline, card: Card, size: int) -> int:
    """Bytes of the states that the text encoders make of the prompts that they read at once, and of one source."""
    text = run.largest.text * prompts_at_once("cuda" if card.cuda else "cpu")
    states = 0
    for name in run.family.text_components:
        file = run.folder / name / "config.json"
        if not (run.folder / name).is_dir():
            continue
        config: dict[str, Any] = read_json(file, "the encoder's configuration") if file.is_file() else DEFAULT_ENCODER
        config = {**config, **(config.get("text_config") or {})}
        hidden = config.get("hidden_size") or config.get("d_model") or 0
        layers = config.get("num_hidden_layers") or config.get("num_layers") or 0
        causal = any("Causal" in kind or "Conditional" in kind for kind in config.get("architectures") or ())
        states = max(states, text * (hidden * (layers + 12) + config.get("vocab_size", 0) * causal))
    return int(size * max(states, PIXEL_CHANNELS * max(p.size[0] * p.size[1] for p in run.pictures)))


def _trial(recipe: Recipe, run: Outline, size: int) -> int:
    """Bytes that the trial's own process takes: a context, two blocks of a kind in float64, and their activations."""
    rows = min(recipe.batch, 2) * activation_bytes(run.tried, run.largest, size)
    return int(CONTEXT + 8 * sum(p.numel() for p in run.tried.parameters()) + rows)
