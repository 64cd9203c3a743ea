"""Which implementation runs: CUDA kernels, their Triton twins, or plain torch; and the sentence that says why.

`DANCEOPD_KERNELS=auto|cuda|triton|torch`. `auto` takes the first of cuda, triton, torch that works here; on a
CPU that is always torch. A shape outside the kernels' envelope runs in torch, said once in the log.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from danceopd.errors import UserError

from . import build

NAMES = ("auto", "cuda", "triton", "torch")
VARIABLE = "DANCEOPD_KERNELS"
HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # bytes of a row that a norm site holds in registers
_log = logging.getLogger("danceopd")
_forced: list[str] = []
_given_up: dict[str, str] = {}
_said: set[str] = set()


def requested() -> str:
    """What `DANCEOPD_KERNELS` asks for, "auto" where it is not set. UserError for any other word."""
    word = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if word not in NAMES:
        raise UserError(f"{VARIABLE}={word} names no backend; use one of {', '.join(NAMES)}")
    return word


def demand() -> None:
    """UserError if the environment asks for a backend by name that cannot run here."""
    word = requested()
    if not _forced and word != "auto" and missing(word):
        raise UserError(f"{VARIABLE}={word}, but {missing(word)}; use auto")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, this backend whatever the environment says; "op": the reference through the custom operators."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    return _given_up.get(name) or _missing(name)


@functools.cache
def _missing(name: str) -> str | None:
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
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def active(device: str) -> str:
    """The backend for tensors on a device type: "cuda", "triton", "torch", or "op" under `using("op")`."""
    word = _forced[-1] if _forced else requested()
    if word in ("op", "torch"):
        return word
    if device != "cuda":
        emulated = word == "cuda" and bool(_forced)  # tests run the CUDA sources on a CPU
        return word if emulated or (word == "triton" and interpreting() and not missing(word)) else "torch"
    if word != "auto":
        demand()
        return word
    return next(name for name in ("cuda", "triton", "torch") if not missing(name))


def give_up(name: str, reason: str) -> None:
    """Take a backend out of `auto`, for this process. UserError if it was asked for by name.

    CannotBuild inside `using`, which leaves no other backend to go on with.
    """
    if _forced and _forced[-1] != "auto":
        raise build.CannotBuild(reason)
    if requested() == name:
        raise UserError(f"{VARIABLE}={name}, but {reason}; use auto")
    _given_up[name] = reason
    once(f"{name} kernels are off: {reason}")


def once(message: str) -> None:
    """A line in the log, the first time only."""
    if message not in _said:
        _said.add(message)
        _log.warning(message)


# The envelope: what the kernels take


def fused(op: str, backend: str, tensors: list[Tensor | None], wide: list[Tensor | None], problem: str = "") -> bool:
    """Whether `op` runs as a kernel. `tensors` share a dtype and a device; `wide` may be fp32 beside half types.

    False for the torch backend, and, said once, for what the kernels do not take; `problem` is what the caller found.
    """
    if backend == "torch":
        return False
    if backend == "op":
        return True
    reason = problem or _outside(backend, [t for t in tensors if t is not None], [t for t in wide if t is not None])
    if reason and not torch.compiler.is_compiling():
        once(f"{op} runs in plain torch: {reason}")
    return not reason


def outside_attention(tensors: list[Tensor], wide: list[Tensor] | None = None) -> str:
    """Why `ragged_attention` cannot take these `(B, S, H, D)` tensors on their device, "" if it can.

    `wide`: norm weights and rotary tables of `prepared_attention`.
    """
    first = tensors[0]
    backend = active(first.device.type)
    if backend == "torch":
        return "the kernels are off (danceopd kernels says why)"
    if backend == "op":
        return ""
    if first.shape[-1] not in HEAD_DIMS:
        return f"heads of {first.shape[-1]} columns (the kernel takes {', '.join(map(str, HEAD_DIMS))})"
    if backend == "cuda" and first.dtype == torch.float32:
        return "takes bf16 and fp16 only"
    if any(t.stride(2) != t.shape[3] for t in tensors if t.shape[2] > 1):
        return "heads are not next to each other"
    return _outside(backend, tensors, wide or [])


def _outside(backend: str, tensors: list[Tensor], wide: list[Tensor]) -> str:
    first = tensors[0]
    if first.dtype not in DTYPES:
        return f"{_name(first)} is not bf16, fp16 or fp32"
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"{_name(first)} is mixed with {_name(tensor)}"
        if tensor.stride(-1) != 1:
            return "a last dimension is not contiguous"
        step = 16 // tensor.element_size()
        if backend == "cuda" and (
            _misplaced(tensor)
            or tensor.shape[-1] % step
            or any(stride % step for stride, size in zip(tensor.stride()[:-1], tensor.shape) if size > 1)
        ):
            return "rows do not start at multiples of 16 bytes"
    for tensor in wide:
        if tensor.dtype not in (first.dtype, torch.float32) or tensor.device != first.device:
            return f"{_name(first)} is mixed with {_name(tensor)}"
        if tensor.stride(-1) != 1:
            return "a weight or a table is not contiguous"
        step = 16 // tensor.element_size()
        if backend == "cuda" and (
            _misplaced(tensor) or any(n % step for n, size in zip(tensor.stride()[:-1], tensor.shape) if size > 1)
        ):
            return "a weight or a table does not start at a multiple of 16 bytes"
    return ""


def _misplaced(tensor: Tensor) -> bool:
    """Whether a tensor starts off 16 bytes. A trace cannot ask; there the kernel's caller copies such a tensor."""
    return not torch.compiler.is_compiling() and tensor.storage_offset() * tensor.element_size() % 16 != 0


def _name(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
