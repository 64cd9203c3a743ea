"""Which attention core runs for a shape: the fastest of those that are here, measured once and remembered.

`attend` drops masks that hide nothing, then asks what is known for (form, shape, dtype, device, with or without a
gradient), token counts rounded up to `BUCKET`, so that prompts of nearly equal length share an answer. A new shape is
measured on the tensors at hand: each candidate must agree with torch's own choice and be `MARGIN` faster to replace
it. Answers are kept below the cache folder, one file for each device and set of library versions. On a CPU, under
`torch.compile` and inside a graph's capture of an unknown shape it is plain SDPA, and nothing is asked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from danceopd.cache import cache_folder
from danceopd.disk import replace_file

from . import choose
from .cores import CORES, Call, Source, absent, candidates, flash4_version, needs_gradient, sdpa
from .masks import all_true, capturing, rows_of

BUCKET = 64
"""Tokens to which a shape's counts are rounded up when its answer is looked up; nothing is padded."""
MARGIN = 1.03
"""How much faster than torch's own choice another core must be."""
NEAR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative distance from torch's own choice at which an answer counts as wrong."""


class Choice(NamedTuple):
    """Which core, and the measurements that say why."""

    core: str
    why: str


_chosen: dict[str, Choice] = {}
_forced: list[str] = []


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside, this core wherever it can run, whatever was measured; also on a CPU."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, source: Source | None = None) -> Tensor:
    """Attention of `(B, S, H, D)` tensors, not causal: `(B, S, H, D)` in the dtype of `q`.

    `mask` is `(B, M)` bool over the first M own keys (the rest are seen), or whatever SDPA takes. Where a `(B, M)`
    mask hides a token, its own output is not defined, but finite.
    """
    call = asked(Call(q, k, v, mask, None, source))
    if runs_plain(call):
        return sdpa(call)
    with torch.cuda.device_of(call.q):  # events are timed, and FlashAttention-4 launches, on the current device
        return _attended(call)


def _attended(call: Call) -> Tensor:
    name = _core(call)
    try:
        return CORES[name](call)
    except (RuntimeError, ImportError) as error:
        if name == "sdpa" or _forced or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        _chosen[key_of(call)] = Choice("sdpa", f"{name} failed: {_line(error)}")
        choose.once(f"attention core {name} failed and SDPA takes over for {key_of(call)}: {_line(error)}")
        return sdpa(call)


def asked(call: Call) -> Call:
    """The same call without a mask that hides nothing, and with its rows where there is a choice and they are known."""
    mask = call.mask
    if mask is None or mask.ndim != 2 or mask.dtype != torch.bool:
        return call
    if all_true(mask):
        return call._replace(mask=None)
    return call if runs_plain(call) else call._replace(rows=rows_of(mask, call.k.shape[1]))


def settled(call: Call) -> str:
    """The core of a call as far as it is known, "" where nobody has measured it yet."""
    if runs_plain(call):
        return "sdpa"
    return _forced[-1] if _forced else _chosen.get(key_of(call), Choice("", "")).core


def runs_plain(call: Call) -> bool:
    """Whether there is nothing to choose: under a trace, and on a CPU."""
    return torch.compiler.is_compiling() or not (call.q.is_cuda or _forced)


def _core(call: Call) -> str:
    if _forced:
        name = _forced[-1]
        reason = absent(name, call) if name in candidates(call) else "not for this form"
        if reason:
            choose.once(f"attention core {name} gives way to SDPA: {reason}")
        return "sdpa" if reason else name
    key = key_of(call)
    if key not in _chosen:
        kept = _load().get(key)
        if kept is None and capturing(call.q):
            return "sdpa"
        _chosen[key] = kept or _keep(key, measure(call))
    return _chosen[key].core


def key_of(call: Call) -> str:
    """A call as the words under which its answer is kept."""
    batch, tokens, heads, dim = call.q.shape
    form = "ragged" if call.rows is not None else "dense" if call.mask is None else "masked"
    bucket = -(-tokens // BUCKET) * BUCKET
    source = "" if call.source is None else f" + source {-(-call.source.k.shape[1] // BUCKET) * BUCKET}"
    kind = str(call.q.dtype).removeprefix("torch.")
    gradient = "with gradient" if needs_gradient(call) else "no gradient"
    return f"{form} {batch}x{bucket}x{heads}x{dim}{source} {kind} {gradient}"


# Measuring


def measure(call: Call, seconds: Callable[[Callable[[], object]], float] | None = None) -> Choice:
    """Every candidate on the call's own tensors; `seconds` times one (default: CUDA events)."""
    seconds = seconds or _seconds
    refused = {name: absent(name, call) for name in candidates(call)}
    if all(reason for name, reason in refused.items() if name != "sdpa"):
        others = [f"{name}: {reason}" for name, reason in refused.items() if reason]
        return Choice("sdpa", ", ".join(["nothing to measure", *others]))
    gradient = needs_gradient(call)
    leaves = [x.detach().requires_grad_(gradient) for x in (call.q, call.k, call.v)]
    call = Call(leaves[0], leaves[1], leaves[2], call.mask, call.rows, call.source)

    def run(name: str) -> Tensor:
        out = CORES[name](call)
        if gradient:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    exact, times = run("sdpa"), {}
    for name, reason in refused.items():
        try:
            if not reason and name != "sdpa":
                reason = _differs(run(name), exact, call)
            if not reason:
                times[name] = seconds(functools.partial(run, name))
        except Exception as error:  # libraries refuse a shape with errors of their own: Triton's, FlashAttention-4's
            reason = _line(error)
        refused[name] = reason
    best = min(times, key=lambda name: times[name] * (1 if name == "sdpa" else MARGIN))
    why = [f"{name} {1e3 * times[name]:.3f} ms" for name in sorted(times, key=times.__getitem__)]
    why += [f"{name}: {reason}" for name, reason in refused.items() if reason]
    return Choice(best, ", ".join(why))


def _differs(out: Tensor, exact: Tensor, call: Call) -> str:
    if call.rows is not None:
        out, exact = (x.flatten(0, 1).index_select(0, call.rows.places) for x in (out, exact))
    distance = ((out.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30)).item()
    return "" if distance <= NEAR[out.dtype] else f"its answer is {distance:.1e} away from SDPA's"


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


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# Keeping


def kept_in() -> Path:
    """The file of this device's answers under these versions of torch, cuDNN and FlashAttention-4."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = f"{torch.__version__} {cudnn} {flash4_version()}"
    digest = hashlib.sha256(versions.encode()).hexdigest()[:12]
    return cache_folder() / "kernels" / f"cores-{re.sub(r'[^a-z0-9]+', '-', device.lower())}-{digest}.json"


def known() -> dict[str, Choice]:
    """Every answer so far: this process's, and what the cache folder keeps."""
    return {**_load(), **_chosen}


def _load() -> dict[str, Choice]:
    with suppress(OSError, ValueError, TypeError, AttributeError):  # nothing there, or damaged: measured again
        found = json.loads(kept_in().read_text(encoding="utf-8"))
        return {key: Choice(*value) for key, value in found.items() if value[0] in CORES}
    return {}


def _keep(key: str, choice: Choice) -> Choice:
    with suppress(OSError):  # no place for a cache: measured again by the next process
        place = kept_in()
        place.parent.mkdir(parents=True, exist_ok=True)
        everything = {**_load(), key: choice}
        replace_file(place, json.dumps(everything, indent=1, sort_keys=True).encode())
    return choice
