"""Drift and diversity on prompts that no teacher is for: distance of each model from the base, and of its seeds.

Every prompt is drawn from several seeds by every model, from the same noise (`--drift`). Distance from the base is
measured image by image: 1 - SSIM of luma (structure), and the distance of 8x8 colour thumbnails. A student should be no
farther than its teachers. Diversity is the mean distance between the seeds of one prompt; a model that collapses has
less than the base. Nothing here is a score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from danceopd.bench import statistics
from danceopd.bench.images import ImageStore
from danceopd.bench.lineup import Lineup
from danceopd.bench.metrics.collapse import fingerprint
from danceopd.bench.metrics.preservation import SSIM_SMALLEST, fitted, ssim, working
from danceopd.bench.suites.protocol import DRIFT, ExactSuite, Item, Suite
from danceopd.common.parse import read_text
from danceopd.errors import UserError

AUTO = "auto"
SEEDS, MOST, BYTES = 4, 200, 1 << 20
PROMPTS = (
    "a lighthouse on a rocky coast at dusk",
    "an old man reading a newspaper on a park bench",
    "a bowl of ramen with a soft-boiled egg, seen from above",
    "a narrow street in a rainy city at night, neon reflections",
    "a golden retriever running through shallow water",
    "a glass greenhouse full of tropical plants",
    "a steam locomotive crossing a stone viaduct",
    "a wooden desk with a laptop, a notebook and a cup of coffee",
    "a portrait of a young woman in soft window light",
    "a snow-covered mountain range under a clear sky",
    "a street market with baskets of oranges and lemons",
    "an astronaut floating above the Earth",
    "a watercolour painting of a sailing boat",
    "a close-up of a dragonfly on a blade of grass",
    "an empty theatre with red seats",
    "a shop sign that says OPEN",
)
"""Ordinary subjects, of the project's own."""
FARTHEST = 3


def drift_items(given: str, suite: Suite) -> list[Item]:
    """`SEEDS` items for each prompt of `--drift`: "auto", or a text file with a prompt in each line.

    For a suite with a small vocabulary of its own, "auto" are its held-out prompts. UserError for a file that is not
    there, has no prompt, or too many.
    """
    if given != AUTO:
        lines = read_text(Path(given).expanduser(), "file of --drift", BYTES).splitlines()
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not 0 < len(prompts) <= MOST:
            raise UserError(f"--drift {given} has {len(prompts)} prompts; give 1 to {MOST}, one in a line")
    elif isinstance(suite, ExactSuite):
        apart = [item.prompt for item in suite.probe_items().get("generation", ()) if item.heldout]
        prompts = list(dict.fromkeys(apart))[: len(PROMPTS)]
        if not prompts:
            raise UserError(f"suite {suite.name} has no prompts that no teacher is for; give --drift a file of prompts")
    else:
        prompts = list(PROMPTS)
    return [
        Item(f"drift-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{seed}", "generation", DRIFT, DRIFT, prompt)
        for prompt in prompts
        for seed in range(SEEDS)
    ]


def measure_drift(items: Sequence[Item], store: ImageStore, lineup: Lineup) -> dict[str, Any] | None:
    """Plain JSON: `prompts`, `seeds`, `models`: name -> {structure, colour, diversity}, `farthest`.

    None without images. A figure is {mean, n, low, high} over prompts, from 0 (equal) to 1. Without the base there is
    diversity only. `farthest`: the images of the base and of the student that differ most, {prompt, distance, base,
    student}.
    """
    base = next(iter(lineup.names("base")), None)
    first = lineup.first_of("generation")
    found: dict[str, dict[str, Any]] = {}
    pairs: list[dict[str, Any]] = []
    for model in lineup.models:
        by_prompt: dict[str, dict[str, list[Any]]] = {}
        for item in items:
            path = store.existing(first[model.name], item)
            if path is None:
                continue
            image = store.read(path)
            parts = by_prompt.setdefault(item.prompt, {"shades": [], "structure": [], "colour": []})
            parts["shades"].append(fingerprint(image).shades)
            other = store.existing(first[base], item) if base else None
            if other is not None and model.name != base:
                origin = store.read(other)
                parts["structure"].append(structure(origin, image))
                parts["colour"].append(colour(origin, image))
                if model is lineup.student:
                    pairs.append({"prompt": item.prompt, "distance": round(parts["structure"][-1], 4)}
                                 | {"base": other, "student": path})  # fmt: skip
        if by_prompt:
            found[model.name] = _figures(list(by_prompt.values()))
    if not found:
        return None
    farthest = {pair["prompt"]: pair for pair in sorted(pairs, key=lambda pair: pair["distance"])}
    top = sorted(farthest.values(), key=lambda pair: -pair["distance"])[:FARTHEST]
    prompts = list(dict.fromkeys(item.prompt for item in items))
    return {"prompts": prompts, "seeds": SEEDS, "models": found, "farthest": top}


def _figures(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    means: dict[str, list[float | None]] = {
        name: [float(np.mean(p[name])) for p in parts if p[name]] for name in ("structure", "colour")
    }
    means["diversity"] = [_spread(p["shades"]) for p in parts if len(p["shades"]) > 1]
    return {
        name: {key: of[key] for key in ("mean", "n", "low", "high")}
        for name, values in means.items()
        if values and (of := statistics.mean(values, share=False, scale=(0.0, 1.0)))
    }


def _spread(shades: Sequence[np.ndarray]) -> float:
    """The mean root-mean-square distance of all pairs."""
    apart = [np.sqrt(((a - b) ** 2).mean()) for n, a in enumerate(shades) for b in shades[:n]]
    return float(np.mean(apart))


def structure(one: Image.Image, other: Image.Image) -> float:
    """1 - SSIM of luma at working size: 0 for equal images."""
    a, b = working(one).convert("L"), working(fitted(other, one)).convert("L")
    if min(a.size) < SSIM_SMALLEST:
        return colour(one, other)
    return float(1 - ssim(a, b).mean())


def colour(one: Image.Image, other: Image.Image) -> float:
    """Root-mean-square distance of the 8x8 colour thumbnails, 0 to 1."""
    return float(np.sqrt(((fingerprint(one).shades - fingerprint(other).shades) ** 2).mean()))
