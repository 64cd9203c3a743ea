"""The time of an update, by part: forwards of a row, FLOPs, and seconds at the speed of a plain matrix product.

A lower bound: what is no matrix product is left out. To compare settings, a batch costs its tokens and `LAUNCH_TOKENS`
more, for kernels of few tokens do not fill a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from danceopd.common.tensors import DTYPES
from danceopd.engine.query import draw_queries, place
from danceopd.labelfree.contrast import contrast_forwards
from danceopd.labelfree.gates.cost import gate_forwards
from danceopd.labelfree.nft.cost import nft_forwards
from danceopd.models.flops import TokenCounts, forward_flops
from danceopd.pipelines.two_transformers import PREFIX
from danceopd.planning.outline import Outline
from danceopd.planning.sources import guidance_of, wanted_sources
from danceopd.recipe.checks import EVERY_STEP, NO_ROLLOUT
from danceopd.recipe.recipe import Recipe
from danceopd.run.validation import forwards

COUNTED, DRAWN = 1000, 10**6  # updates and queries that are counted, at most
BINS = 10
LAUNCH_TOKENS = 200
DEQUANTISE_TOKENS = 300
"""What a batch costs more, in tokens, where each weight is dequantised for it: 4.5 bytes moved a weight."""
COPY_SPEED = 20e9
"""Bytes a second from the computer's memory to a card."""
COPY_TOKENS = 7500
"""What a batch costs more, in tokens, where each weight is brought to the card for it, at `COPY_SPEED`."""


def queries(recipe: Recipe, run: Outline) -> dict[str, Any]:
    """How deep the rollouts go, on the commonest picture size, and the share of queries in each tenth of noise."""
    if recipe.objective in NO_ROLLOUT:
        return {"depth": 0.0, "levels": [], "depths": []}
    schedule, query = run.sigmas(run.pictures[0].size, recipe.rollout.steps), recipe.query
    if recipe.objective in EVERY_STEP:
        levels, depths = schedule[:-1], []
        mean_depth = float(len(levels) - (recipe.objective == "diffusionopd"))
    else:
        drawn = [draw_queries(recipe.seed, s, recipe.batch, query.count, query.law, query.beta, query.law_options)
                 for s in range(max(1, min(recipe.steps, COUNTED, DRAWN // (recipe.batch * query.count))))]  # fmt: skip
        stops, levels = place(torch.cat(drawn), schedule, query.law, query.jitter)
        depth = stops.max(1).values
        mean_depth, depths = float(depth.double().mean()), (torch.bincount(depth) / len(depth)).tolist()
        if recipe.objective == "nft" and recipe.nft.share == 1:
            mean_depth = 0.0  # nothing is distilled
    counts = torch.histc(levels.flatten().float(), BINS, 0.0, 1.0)
    return {"depth": mean_depth, "levels": (counts / counts.sum()).tolist(), "depths": depths}


def update(recipe: Recipe, run: Outline, found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Forwards of one row in an update, and FLOPs of the whole update, by part; `found` are its `queries`.

    A backward counts as one more forward (frozen weights need no gradient), a LoRA layer by its rank.
    """
    passes, shares, flops = _passes(recipe, found["depth"]), recipe.shares(), run.row_flops(recipe)
    row = sum(shares[t.name] * flops[t.capability] for t in recipe.teachers)
    lora, unmerged = _lora_share(recipe, run), () if recipe.rollout.merged else ("rollout",)
    layers = {part for part in passes if part.startswith("student") or part in unmerged}
    total = {part: recipe.batch * count * row * (1 + lora * (part in layers)) for part, count in passes.items()}
    more = gate_forwards(recipe, run.datasets, found["depths"]) | nft_forwards(recipe)
    for part, counts in more.items():
        passes[part] = sum(shares[t.name] * counts[t.name] for t in recipe.teachers)
        total[part] = recipe.batch * sum(shares[t.name] * counts[t.name] * flops[t.capability] for t in recipe.teachers)
    if references := contrast_forwards(recipe):
        drawn = recipe.rollout.steps if recipe.objective == "offpolicy" and recipe.offpolicy.clean == "teacher" else 0
        times = drawn + _queries(recipe)[1]
        asked = [(times * shares[t.name] * references[t.name], flops[t.capability]) for t in recipe.teachers]
        passes["contrast"] = sum(count for count, _ in asked)
        total["contrast"] = recipe.batch * sum(count * flop for count, flop in asked)
    if recipe.validation.every:
        sigmas = run.sigmas(run.pictures[0].size, recipe.rollout.steps)
        passes["validation"] = forwards(recipe, sigmas) / (recipe.steps * recipe.batch)
        total["validation"] = recipe.batch * passes["validation"] * sum(flops.values()) / len(flops)
    return passes, total


def drawing(recipe: Recipe, run: Outline) -> dict[str, float]:
    """What is drawn before training (`data: auto`): pictures that are not there yet, forwards and FLOPs of all."""
    wanted = wanted_sources(recipe, run.datasets)
    missing = sum(not path.is_file() for path in wanted)
    if not missing:
        return {"pictures": 0, "forwards": 0, "flops": 0.0}
    guided = 1 if guidance_of(recipe, run.folder, run.family) is None else 2
    side, call = run.family.token_side(run.pipe), run.call
    tokens = run.family.frames(run.pipe, call) * (call["height"] // side) * (call["width"] // side)
    row = forward_flops(run.transformer, TokenCounts(tokens, 0, call.get("max_sequence_length") or 512))
    forwards = missing * guided * call["num_inference_steps"] * recipe.small_steps
    return {"pictures": missing, "forwards": forwards, "flops": forwards * row}


def _passes(recipe: Recipe, depth: float) -> dict[str, float]:
    steps, shares = recipe.rollout.steps, recipe.shares()
    states, asked = _queries(recipe)
    unconditional = recipe.guidance.unconditional
    calls = {t.name: 1.0 + (0 if t.guidance is None else 1 - unconditional) for t in recipe.teachers}
    teacher = sum(shares[n] * c for n, c in calls.items())
    drawn = steps if recipe.objective == "offpolicy" and recipe.offpolicy.clean == "teacher" else 0
    every, monitor = recipe.monitored_every, recipe.monitor
    mean = sum(calls.values()) / len(calls)
    monitored = {"monitor": monitor.forwards(steps, mean) / (every * recipe.batch)} if every else {}
    return {
        "rollout": depth * (1 if recipe.rollout.guidance == 1 else 2),
        "teachers": (drawn + asked * recipe.small_steps) * teacher,
        "student, forward": float(states),
        "student, backward": float(states),
        **({"student, recomputed": float(states)} if recipe.gradient_checkpointing else {}),
        **monitored,
    }


def _queries(recipe: Recipe) -> tuple[int, int]:
    """States of a row at which the student is asked with a gradient, and at which its teacher is."""
    states = recipe.rollout.steps if recipe.objective in EVERY_STEP else recipe.query.count
    if recipe.objective == "nft":
        distilled = states * (recipe.nft.share < 1)
        return states + distilled, distilled + states * (recipe.nft.anchor > 0)
    return states, 0 if recipe.objective == "supervised" else states


def _lora_share(recipe: Recipe, run: Outline) -> float:
    """FLOPs of the student's LoRA layers, as a share of a forward's, on the commonest picture."""
    picture = run.pictures[0]
    added = sum(
        2 * recipe.student.rank * (m.in_features + m.out_features) * picture.tokens.through(path)
        for path, m in run.modules.items()
        if not path.startswith(PREFIX)  # a row goes through one of two transformers
    )
    return added / picture.flops


def relative_time(recipe: Recipe, run: Outline, found: Mapping[str, Any]) -> float:
    """The time of an update in a unit that compares settings of one recipe on one card."""
    rows, tokens = min(recipe.batch, recipe.rows_at_once), _mean_tokens(recipe, run)
    more = LAUNCH_TOKENS + DEQUANTISE_TOKENS * (run.kept(recipe) is not None)
    more += COPY_TOKENS * (recipe.offload == "blocks")
    return sum(update(recipe, run, found)[1].values()) * (1 + more / (rows * tokens))


def copies(recipe: Recipe, run: Outline, passes: Mapping[str, float]) -> float:
    """Seconds of an update in which the base's blocks are copied to the card (`offload: blocks`)."""
    if recipe.offload != "blocks":
        return 0.0
    batches = -(-recipe.batch // recipe.rows_at_once)
    size = DTYPES[recipe.dtype].itemsize * sum(p.numel() for p in run.transformer.parameters())
    forwards = sum(count for part, count in passes.items() if part != "student, backward")
    return batches * forwards * size / COPY_SPEED


def _mean_tokens(recipe: Recipe, run: Outline) -> float:
    capabilities = [t.capability for t in recipe.teachers]
    return sum(p.share * p.tokens.all for p in run.pictures) / len(set(capabilities))


def measure(device: torch.device, seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """TFLOP/s of a plain matrix product in the dtype that a merge computes in."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    (a @ b).sum().item()
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        (a @ b)[0, 0].item()
        count += 1
    return 2 * side**3 * count / spent / 1e12
