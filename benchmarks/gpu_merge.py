"""A whole merge at true size for `benchmarks/gpu.py`: FLUX.2 klein-4B with random weights, updates, and the export.

The transformer and the VAE have the released model's dimensions, the text encoder only its width. Two random LoRAs of
rank 32 draw and edit. Each variant is `danceopd.merge` itself: three updates, a sample grid, and the proven export; its
peaks of memory stand beside those of `danceopd plan`.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from rich.console import Console

from danceopd.adapters.write import write_adapter
from danceopd.merge import merge
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from tiny import random_adapter, random_image, tiny_klein  # noqa: E402

HEAD = "a merge of klein-4B | px | s an update | rows a second | training, GB | planned | export, GB | planned | all, s"
KLEIN = {
    "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
    "timestep_guidance_channels": 256, "mlp_ratio": 3.0, "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000,
}  # fmt: skip
UPDATES, BATCH = 3, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "stock modules": {"kernels": False},
    "kernels auto": {},
    "kernels auto, CUDA graphs": {"rollout": {"merged": True, "cuda_graphs": True}},
    "kernels auto, gradient checkpointing": {"gradient_checkpointing": True},
    "kernels auto, merged: false": {"rollout": {"merged": False}},
    "base_dtype: nf4": {"base_dtype": "nf4"},
    "offload: blocks": {"offload": "blocks"},
}
"""What each variant's recipe has of its own: the first five are the plain ways, the last two those of small cards."""


def build(folder: Path, device: str, smoke: bool) -> dict[str, Any]:
    """The base, its LoRAs and their data in `folder`; the recipe's fields."""
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if smoke else torch.bfloat16)
        try:
            pipe = tiny_klein() if smoke else tiny_klein(width=2560, vae=AutoencoderKLFlux2(), **KLEIN)
        finally:
            torch.set_default_dtype(before)
    pipe.save_pretrained(folder / "base")
    for i, name in enumerate(("draws", "edits")):
        adapter = random_adapter(pipe.transformer, 4 if smoke else 32, seed=i, size=0.1 if smoke else 0.01)
        write_adapter(adapter, folder / name, torch.bfloat16)
    side = 64 if smoke else 1024
    (folder / "prompts.txt").write_text("a red circle\ntwo blue square\na white ring above\n")
    for i in range(2):
        random_image(i, side, side).save(folder / f"{i}.png")
    (folder / "edits.csv").write_text("prompt,image\nmake it red,0.png\nremove the star,1.png\n")
    return {
        "base": str(folder / "base"), "generation": str(folder / "draws"), "editing": str(folder / "edits"),
        "data": {"generation": str(folder / "prompts.txt"), "editing": str(folder / "edits.csv")},
        "steps": UPDATES, "batch": BATCH, "student": {"rank": 4 if smoke else 64}, "device": device,
        "validation": {"every": 0}, "monitor": {"every": 0}, "samples": {"every": 0, "count": 1},
    }  # fmt: skip


def real_merge(bench: Any, smoke: bool, folder: Path | None) -> None:
    """A line for each variant; nothing is begun when the time is over."""
    with tempfile.TemporaryDirectory(prefix="danceopd-merge-", dir=folder) as place:
        fields = bench.attempt("the model", lambda: build(Path(place), bench.device, smoke))
        bench.release()
        sizes = (64,) if smoke else (512, 1024)
        for name, own in VARIANTS.items() if fields else ():
            if own.get("base_dtype") and importlib.util.find_spec("bitsandbytes") is None:
                bench.failures.append(f"{name}: bitsandbytes is not installed")
                continue
            for side in sizes if name == "stock modules" else sizes[-1:]:
                if not bench.late:
                    output = Path(place) / f"run-{len(bench.merges)}-{len(bench.failures)}"
                    call = {"height": side, "width": side, "num_inference_steps": 4 if smoke else 28}
                    recipe = {**fields, **own, "output": str(output), "call": {**call, "max_sequence_length": 64}}
                    bench.attempt(f"{name}, {side} px", lambda r=recipe, n=name, s=side: one(bench, r, n, s))
                    bench.release()


def one(bench: Any, fields: Mapping[str, Any], name: str, side: int) -> str:
    """Merge, and one line of the table."""
    recipe, began, ends, peaks = Recipe(**fields), time.perf_counter(), [], []
    planned = plan(recipe, tflops=1.0)["peak"]

    def report(metrics: Any, steps: int) -> None:
        ends.append(time.perf_counter())
        if metrics.step == steps:
            peaks.append(peak(bench.device))

    peak(bench.device)
    merge(recipe, report)
    peaks.append(peak(bench.device))
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))
    held = [f"{p / 1e9:.1f}" if p else "" for p in peaks]
    cells = [
        name, str(side), f"{seconds:.2f}", f"{recipe.batch / seconds:.2f}",
        held[0], f"{max(planned[phase] for phase in ('training', 'samples')) / 1e9:.1f}",
        held[1], f"{planned['export'] / 1e9:.1f}", f"{time.perf_counter() - began:.0f}",
    ]  # fmt: skip
    bench.merges.append(f"| {' | '.join(cells)} |")
    Console().print(bench.merges[-1], highlight=False, markup=False)
    return bench.merges[-1]


def peak(device: str) -> int:
    """Bytes that torch held at most since the last call (0 on a CPU)."""
    if device == "cpu":
        return 0
    found = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(found)
