"""Load machine code and launch it, through the CUDA driver by ctypes: no torch extension, no headers.

Modules are loaded once for each device, into torch's own context. Kernels run on torch's current stream, so CUDA
graphs capture them; launch once before a capture begins, because loading cannot be captured. An autograd thread that
has run nothing on the device yet has no CUDA context: it gets torch's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping

import torch

from danceopd.kernels.cuda import build


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return library


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status}, {(text.value or b'unknown').decode()}")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The primary context of a device, which torch uses; retained, so that it lives as long as the modules."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_library().cuDeviceGet(ctypes.byref(handle), device), "finding the device")
    _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "finding the device's context")
    return context


def _enter(device: int) -> None:
    """Set the device's context for this thread if it has none: the CUDA runtime does so at its own first launch."""
    context = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if not context.value:
        _check(_library().cuCtxSetCurrent(_context(device)), "entering the context")


@functools.cache
def _module(device: int, name: str, defines: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    module, what = ctypes.c_void_p(), (name, f"sm_{major}{minor}", dict(defines))
    if _library().cuModuleLoadData(ctypes.byref(module), build.cubin(*what)):  # the kept file may be damaged
        _check(_library().cuModuleLoadData(ctypes.byref(module), build.cubin(*what, anew=True)), f"loading {name}")
    return module


@functools.cache
def _function(device: int, name: str, defines: tuple[tuple[str, int], ...], entry: str) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    module = _module(device, name, defines)
    _check(_library().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), f"finding {entry}")
    return function


def launch(
    like: torch.Tensor,
    name: str,
    entry: str,
    defines: Mapping[str, int],
    grid: tuple[int, int],
    threads: int,
    argument: ctypes.Structure,
) -> None:
    """Run `entry` of `csrc/<name>.cu` on the device of `like`: `grid` blocks of `threads`, one struct by value."""
    device = like.device.index
    with torch.cuda.device(device):
        _enter(device)
        function = _function(device, name, tuple(sorted(defines.items())), entry)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        stream = torch.cuda.current_stream(device).cuda_stream
        _check(_library().cuLaunchKernel(function, *grid, 1, threads, 1, 1, 0, stream, pointers, None), entry)
