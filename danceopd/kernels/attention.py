"""Attention with the fastest backend for each shape: measured once on the GPU, then remembered.

`attend` drops masks that hide nothing, then looks up which backend of `attention_backends.py` to use for this (form,
shape, dtype, device, with or without a gradient); token counts are rounded up to a multiple of `BUCKET` in the lookup,
so that prompts of nearly equal length share an entry. A new shape is measured on the tensors of the call: a backend
replaces torch's SDPA only if its result agrees and it is `MARGIN` times as fast. Results are kept below the cache
folder, one file for each device and set of library versions.

Plain SDPA and no lookup: on a CPU, under `torch.compile`, and for a new shape inside a CUDA graph capture.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from danceopd.common.cache import cache_folder
from danceopd.common.files import write_json
from danceopd.errors import UserError
from danceopd.kernels import backend
from danceopd.kernels.attention_backends import (
    ATTENTION_BACKENDS,
    AttentionCall,
    CachedKV,
    candidates,
    flash4_version,
    needs_gradient,
    sdpa,
    unavailable,
)
from danceopd.kernels.masks import all_true, is_capturing, unpad

BUCKET = 64
"""Token counts are rounded up to a multiple of this for the lookup; nothing is padded."""
MARGIN = 1.03
"""How many times as fast as SDPA another backend must be."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative distance from SDPA's result above which a backend counts as wrong."""


class Choice(NamedTuple):
    """The attention backend for a shape, the measurements that decided it, as text, and whether to keep it on disk."""

    backend: str
    reason: str
    keep: bool = True


_chosen: dict[str, Choice] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, source: CachedKV | None = None) -> Tensor:
    """Non-causal attention of `(B, S, H, D)` tensors: `(B, S, H, D)` in the dtype of `q`.

    `mask`: `(B, M)` bool over the first M own keys (the rest are visible), or whatever SDPA takes. Where a `(B, M)`
    mask hides a token, the output of that token is finite and otherwise undefined.
    """
    call = simplified(AttentionCall(q, k, v, mask, None, source))
    if uses_plain_sdpa(call):
        return sdpa(call)
    with torch.cuda.device_of(call.q):  # events are timed, and FlashAttention-4 launches, on the current device
        return _attend(call)


def _attend(call: AttentionCall) -> Tensor:
    name = _select(call)
    try:
        return ATTENTION_BACKENDS[name](call)
    except (RuntimeError, ImportError) as error:
        if name == "sdpa" or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        _chosen[shape_key(call)] = Choice("sdpa", f"{name} failed: {_first_line(error)}")
        backend.warn_once(f"attention backend {name} failed, using SDPA for {shape_key(call)}: {_first_line(error)}")
        return sdpa(call)


def simplified(call: AttentionCall) -> AttentionCall:
    """The same call without a mask that hides nothing, and with its visible tokens where a backend may use them."""
    mask = call.mask
    if mask is None or mask.ndim != 2 or mask.dtype != torch.bool:
        return call
    if all_true(mask):
        return call._replace(mask=None)
    return call if uses_plain_sdpa(call) else call._replace(unpadded=unpad(mask, call.k.shape[1]))


def uses_plain_sdpa(call: AttentionCall) -> bool:
    """Whether there is nothing to choose: under a trace, and on a CPU."""
    return torch.compiler.is_compiling() or not call.q.is_cuda


def _select(call: AttentionCall) -> str:
    key = shape_key(call)
    if key not in _chosen:
        kept = _load().get(key)
        if kept is None and is_capturing(call.q):
            return "sdpa"
        _chosen[key] = kept or _store(key, measure(call))
    return _chosen[key].backend


def shape_key(call: AttentionCall) -> str:
    """Form, shape, dtype and gradient of a call as text: the key under which its choice is kept."""
    batch, tokens, heads, dim = call.q.shape
    form = "ragged" if call.unpadded is not None else "dense" if call.mask is None else "masked"
    bucket = -(-tokens // BUCKET) * BUCKET
    source = "" if call.source is None else f" + source {-(-call.source.k.shape[1] // BUCKET) * BUCKET}"
    kind = str(call.q.dtype).removeprefix("torch.")
    gradient = "with gradient" if needs_gradient(call) else "no gradient"
    return f"{form} {batch}x{bucket}x{heads}x{dim}{source} {kind} {gradient}"


# Measuring


def measure(call: AttentionCall, seconds: Callable[[Callable[[], object]], float] | None = None) -> Choice:
    """Run every candidate on the call's own tensors and choose; `seconds` times one (default: CUDA events)."""
    seconds = seconds or _seconds
    refused = {name: unavailable(name, call) for name in candidates(call)}
    if all(reason for name, reason in refused.items() if name != "sdpa"):
        others = [f"{name}: {reason}" for name, reason in refused.items() if reason]
        return Choice("sdpa", ", ".join(["nothing to measure", *others]))
    gradient = needs_gradient(call)
    leaves = [x.detach().requires_grad_(gradient) for x in (call.q, call.k, call.v)]
    call = AttentionCall(leaves[0], leaves[1], leaves[2], call.mask, call.unpadded, call.source)

    def run(name: str) -> Tensor:
        # Inside a checkpointed block, hooks would pack what is saved here, and recompute the block to unpack it.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            out = ATTENTION_BACKENDS[name](call)
            if gradient:
                torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    expected, times, keep = run("sdpa"), {}, True
    for name, reason in refused.items():
        try:
            if not reason and name != "sdpa":
                reason = _differs(run(name), expected, call)
            if not reason:
                times[name] = seconds(functools.partial(run, name))
        except torch.cuda.OutOfMemoryError as error:  # says nothing about the next run
            reason, keep = _first_line(error), False
        except Exception as error:  # libraries refuse a shape with errors of their own: Triton's, FlashAttention-4's
            reason = _first_line(error)
        refused[name] = reason
    best = min(times, key=lambda name: times[name] * (1 if name == "sdpa" else MARGIN))
    found = [f"{name} {1e3 * times[name]:.3f} ms" for name in sorted(times, key=times.__getitem__)]
    found += [f"{name}: {reason}" for name, reason in refused.items() if reason]
    return Choice(best, ", ".join(found), keep)


def _differs(out: Tensor, expected: Tensor, call: AttentionCall) -> str:
    if call.unpadded is not None:
        out, expected = (x.flatten(0, 1).index_select(0, call.unpadded.indices) for x in (out, expected))
    distance = ((out.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
    return "" if distance <= TOLERANCE[out.dtype] else f"differs from SDPA by {distance:.1e}"


def _seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of one call on the current stream, after three to warm up."""
    times = []
    for i in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# The cache on disk


def cache_file() -> Path:
    """The file of this device's choices under these versions of torch, cuDNN and FlashAttention-4."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = f"{torch.__version__} {cudnn} {flash4_version()}"
    digest = hashlib.sha256(versions.encode()).hexdigest()[:12]
    return cache_folder() / "kernels" / f"attention-{re.sub(r'[^a-z0-9]+', '-', device.lower())}-{digest}.json"


def choices() -> dict[str, Choice]:
    """Every choice so far by shape key: this process's, and what the cache folder keeps."""
    return {**_load(), **_chosen}


def _load() -> dict[str, Choice]:
    with suppress(OSError, ValueError, TypeError, AttributeError):  # nothing there, or damaged: measured again
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: Choice(*value[:2]) for key, value in found.items() if value[0] in ATTENTION_BACKENDS}
    return {}


def _store(key: str, choice: Choice) -> Choice:
    if not choice.keep:
        return choice
    with suppress(OSError, UserError):  # no place for a cache: measured again by the next process
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        everything = {**_load(), key: choice}
        write_json(file, {key: one[:2] for key, one in sorted(everything.items())})
    return choice
