"""The attention backends side by side, for `benchmarks/gpu.py`: dense, ragged and with a cached source; forward only.

Times are of calls, launches included, because packing rows takes launches. A backend that refuses a shape says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from danceopd.kernels import attention
from danceopd.kernels.attention_backends import AttentionCall, CachedKV, candidates, unavailable
from danceopd.kernels.masks import unpad

NAMES = ("sdpa", "cudnn", "flash4", "varlen")
HEAD = f"attention, ms | {' | '.join(NAMES)} | chosen"
# label, heads, head dim, text tokens (half of them hidden in the second of two rows), source tokens for each picture
MODELS = (
    ("Qwen-Image, two prompts", 24, 128, 256, 0),
    ("Z-Image, two prompts", 30, 128, 224, 0),
    ("SD3.5-M, two prompts", 24, 64, 333, 0),
    ("klein KV, one source", 32, 128, 512, 1),
    ("klein-4B, dense", 24, 128, 0, 0),
)


def measure(bench: Any, sizes: Sequence[int], smoke: bool) -> None:
    """The rows under `HEAD`."""
    for label, heads, dim, text, sources in MODELS:
        for size in sizes:
            if bench.late:
                return
            label_of = f"{label}, {size} px"
            given = bench, (size // 16) ** 2, 1 if smoke else heads, dim, text, sources
            cells = bench.attempt(label_of, lambda given=given: _row(bench, _call(*given), smoke))
            if cells is not None:
                bench.attention.append(f"| {label_of} | {' | '.join(cells)} |")
                Console().print(bench.attention[-1], highlight=False, markup=False)


def _call(bench: Any, image: int, heads: int, dim: int, text: int, sources: int) -> AttentionCall:
    batch = 1 if sources else 2
    kind = {"device": bench.device, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(batch, text + image, heads, dim, **kind) for _ in "qkv")
    if sources:
        cached = [torch.randn(batch, sources * image, heads, dim, **kind) for _ in "kv"]
        return AttentionCall(q, k, v, source=CachedKV(cached[0], cached[1], text))
    if text:
        mask = torch.arange(text, device=bench.device) < torch.tensor([[text], [text // 2]]).to(bench.device)
        return AttentionCall(q, k, v, mask, unpad(mask, text + image))
    return AttentionCall(q, k, v)


@torch.no_grad()
def _row(bench: Any, call: AttentionCall, smoke: bool) -> list[str]:
    times: dict[str, float] = {}
    cells = []
    for name in NAMES:
        reason = "not for this form" if name not in candidates(call) else unavailable(name, call)
        try:
            if not reason:
                times[name] = bench.calls(lambda name=name: attention.ATTENTION_BACKENDS[name](call))
        except Exception as error:  # libraries refuse a shape with errors of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:60]
        cells.append(reason.replace("|", "/") or f"{1e3 * times[name]:.3f}")
    chosen = "sdpa" if smoke else attention.measure(call).backend
    return [*cells, chosen]
