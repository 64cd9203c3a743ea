"""Which implementation of the kernels runs: CUDA, Triton or plain torch; and why another one does not.

`active(device_type)` gives the name for the tensors of a call. The environment variable `DANCEOPD_KERNELS` chooses:
`auto` (the default) takes the first of cuda, triton and torch that works on this machine, and `cuda`, `triton` or
`torch` names one. CPU tensors always run in plain torch. A call that the kernels do not support (head dim, dtype,
alignment) runs in plain torch and is named once in the log.

Not to be confused with the attention backends of diffusers (SDPA, cuDNN, FlashAttention): see
`attention_backends.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from danceopd.errors import UserError
from danceopd.kernels.cuda import build

NAMES = ("auto", "cuda", "triton", "torch")
VARIABLE = "DANCEOPD_KERNELS"
HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW_BYTES = 16384
"""Longest row of hidden states that `add_norm` takes: it is held in registers."""

_log = logging.getLogger("danceopd")
_forced: list[str] = []
_disabled: dict[str, str] = {}
_warned: set[str] = set()


def requested() -> str:
    """The value of `DANCEOPD_KERNELS`, "auto" where it is not set. UserError if it names no backend."""
    name = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if name not in NAMES:
        raise UserError(f"{VARIABLE}={name} is not a kernel backend; use one of {', '.join(NAMES)}")
    return name


def check_requested() -> None:
    """UserError if `DANCEOPD_KERNELS` names a backend that cannot run on this machine."""
    name = requested()
    if not _forced and name != "auto" and unavailable(name):
        raise UserError(f"{VARIABLE}={name}, but {unavailable(name)}; use auto")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, run this backend whatever the environment says; "op": the custom operators with the torch reference."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    return _disabled.get(name) or _unavailable(name)


@functools.cache
def _unavailable(name: str) -> str | None:
    if name == "torch":
        return None
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'danceopd[gpu]')"
    if name == "triton" and interpreting():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, below 8.0"
    if name == "cuda" and build.compiler() is None:
        return "there is neither NVRTC nor nvcc to compile with"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the Triton kernels, on a CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def active(device_type: str) -> str:
    """The backend for tensors on a device type: "cuda", "triton", "torch", or "op" under `using("op")`."""
    name = _forced[-1] if _forced else requested()
    if name in ("op", "torch"):
        return name
    if device_type != "cuda":
        emulated = name == "cuda" and bool(_forced)  # tests run the CUDA sources on a CPU
        return name if emulated or (name == "triton" and interpreting() and not unavailable(name)) else "torch"
    if name != "auto":
        check_requested()
        return name
    return next(name for name in ("cuda", "triton", "torch") if not unavailable(name))


def disable(name: str, reason: str) -> None:
    """Take a backend out of `auto` for this process: called when a kernel cannot be built.

    UserError if `DANCEOPD_KERNELS` names this backend. CannotBuild inside `using`, which allows no other one.
    """
    if _forced and _forced[-1] != "auto":
        raise build.CannotBuild(reason)
    if requested() == name:
        raise UserError(f"{VARIABLE}={name}, but {reason}; use auto")
    _disabled[name] = reason
    warn_once(f"{name} kernels are switched off: {reason}")


def warn_once(message: str) -> None:
    """Log a warning, the first time only."""
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


# What the kernels support


def use_kernel(
    op: str, backend: str, tensors: list[Tensor | None], mixed: list[Tensor | None], problem: str = ""
) -> bool:
    """Whether this call of `op` runs as a kernel of `backend` (else plain torch, said once in the log).

    `tensors` must share one dtype and device; those in `mixed` (norm weights, rotary tables) may be fp32 beside
    half-precision ones. `problem`: a reason that the caller found already, "" for none.
    """
    if backend == "torch":
        return False
    if backend == "op":
        return True
    tracing = torch.compiler.is_compiling()
    given, wide = (tuple(_layout(t) for t in group if t is not None) for group in (tensors, mixed))
    reason = problem or (_unsupported.__wrapped__ if tracing else _unsupported)(backend, given, wide)
    if reason and not tracing:
        warn_once(f"{op} runs in plain torch: {reason}")
    return not reason


class _Layout(NamedTuple):
    """What of a tensor decides whether a kernel takes it."""

    dtype: torch.dtype
    device: torch.device
    size: int  # bytes of a number
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    misaligned: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"


def _layout(x: Tensor) -> _Layout:
    return _Layout(x.dtype, x.device, x.element_size(), x.shape, x.stride(), _misaligned(x))


@functools.lru_cache(maxsize=4096)  # a call repeats the layouts of the call before
def _unsupported(backend: str, tensors: tuple[_Layout, ...], mixed: tuple[_Layout, ...]) -> str:
    first = tensors[0]
    if first.dtype not in DTYPES:
        return f"{first} is not bf16, fp16 or fp32"
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"{first} is mixed with {tensor}"
        if tensor.stride[-1] != 1:
            return "a last dimension is not contiguous"
        step = 16 // tensor.size
        if backend == "cuda" and (
            tensor.misaligned
            or tensor.shape[-1] % step
            or any(stride % step for stride, size in zip(tensor.stride[:-1], tensor.shape) if size > 1)
        ):
            return "rows do not start at multiples of 16 bytes"
    for tensor in mixed:
        if tensor.dtype not in (first.dtype, torch.float32) or tensor.device != first.device:
            return f"{first} is mixed with {tensor}"
        if tensor.stride[-1] != 1:
            return "a weight or a table is not contiguous"
        step = 16 // tensor.size
        if backend == "cuda" and (
            tensor.misaligned or any(n % step for n, size in zip(tensor.stride[:-1], tensor.shape) if size > 1)
        ):
            return "a weight or a table does not start at a multiple of 16 bytes"
    return ""


def _misaligned(tensor: Tensor) -> bool:
    """Whether a tensor starts off a multiple of 16 bytes.

    False under a trace, which cannot tell; the CUDA launcher copies such a tensor (`launch._aligned_copy`).
    """
    return not torch.compiler.is_compiling() and tensor.storage_offset() * tensor.element_size() % 16 != 0
