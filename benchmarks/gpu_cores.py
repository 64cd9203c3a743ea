"""The attention cores side by side, for `benchmarks/gpu.py`: dense, ragged and with a cached source; forward only.

Times are of calls, launches included, because packing rows is launches. What refuses a shape says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from danceopd.attention import core, using
from danceopd.attention.cores import Call, Source, absent, candidates
from danceopd.attention.masks import rows_of

NAMES = ("sdpa", "cudnn", "flash4", "varlen", "ours")
HEAD = f"attention core, ms | {' | '.join(NAMES)} | ours against sdpa | chosen"
# label, heads, head dim, text tokens (half of them hidden in the second of two rows), source tokens for each picture
MODELS = (
    ("Qwen-Image, two prompts", 24, 128, 256, 0),
    ("Z-Image, two prompts", 30, 128, 224, 0),
    ("SD3.5-M, two prompts", 24, 64, 333, 0),
    ("klein KV, one source", 32, 128, 512, 1),
    ("klein-4B, dense", 24, 128, 0, 0),
)


def measure(bench: Any, sizes: Sequence[int], smoke: bool) -> list[str]:
    """Rows of a table under `HEAD`."""
    rows = []
    for label, heads, dim, text, sources in MODELS:
        for size in sizes:
            if bench.late:
                return rows
            image, heads = (size // 16) ** 2, 1 if smoke else heads
            batch = 1 if sources else 2
            kind = {"device": bench.device, "dtype": torch.bfloat16}
            q, k, v = (torch.randn(batch, text + image, heads, dim, **kind) for _ in "qkv")
            call = Call(q, k, v)
            if sources:
                cached = [torch.randn(batch, sources * image, heads, dim, **kind) for _ in "kv"]
                call = call._replace(source=Source(cached[0], cached[1], text))
            elif text:
                mask = torch.arange(text, device=bench.device) < torch.tensor([[text], [text // 2]]).to(bench.device)
                call = call._replace(mask=mask, rows=rows_of(mask, text + image))
            rows.append(f"| {label}, {size} px | {' | '.join(_row(bench, call, smoke))} |")
            Console().print(rows[-1], highlight=False, markup=False)
    return rows


@torch.no_grad()
def _row(bench: Any, call: Call, smoke: bool) -> list[str]:
    times: dict[str, float] = {}
    cells = []
    with using("op") if smoke else using("cuda"):
        for name in NAMES:
            reason = "not for this form" if name not in candidates(call) else absent(name, call)
            try:
                if not reason:
                    times[name] = bench.calls(lambda name=name: core.CORES[name](call))
            except (RuntimeError, ImportError) as error:
                reason = str(error).splitlines()[0][:60]
            cells.append(reason or f"{1e3 * times[name]:.3f}")
        chosen = "sdpa" if smoke else core.measure(call).core
    return [*cells, f"{times['sdpa'] / times['ours']:.2f}x" if "ours" in times else "", chosen]
