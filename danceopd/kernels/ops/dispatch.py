"""What all operators share: calling the implementation of the active backend, and the conventions of their arguments.

`run("qkv_prep", like, *arguments)` calls `qkv_prep` of `cuda/launch.py`, of `triton/` or of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from danceopd.kernels import backend, reference
from danceopd.kernels.cuda import build
from danceopd.kernels.inputs import Stream

Maybe = Tensor | None
TRITON = {
    "qkv_prep": "qkv",
    "qkv_prep_backward": "qkv",
    "add_norm": "rows",
    "add_norm_backward": "rows",
    "swiglu": "rows",
    "swiglu_backward": "rows",
}
"""In which file of `danceopd.kernels.triton` each kernel is."""


def run(function: str, like: Tensor, *arguments: Any) -> Any:
    """Call `function` of the active backend for `like`; if a CUDA kernel cannot be built, of the next backend."""
    while True:
        name = backend.active(like.device.type)
        try:
            with torch.cuda.device_of(like):  # Triton launches on the current device
                return getattr(_implementation(name, function), function)(*arguments)
        except build.CannotBuild as error:
            backend.disable(name, str(error))


@cache
def _implementation(name: str, function: str) -> Any:
    """The module that holds `function` for a backend; imported on first use, for Triton need not be installed."""
    if name == "cuda":
        return import_module("danceopd.kernels.cuda.launch")
    if name == "triton":
        return import_module(f"danceopd.kernels.triton.{TRITON[function]}")
    return reference


def direct(operator: Any) -> Callable[..., Any]:
    """The function behind an operator where nothing needs the operator, which takes most of a call's host time.

    A gradient needs it, a trace, a dispatch mode, and tensors of other classes than torch's own.
    """
    function = operator._init_fn

    @wraps(function)
    def call(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
            or torch._C._len_torch_dispatch_stack()
            or any(type(x) not in (Tensor, Parameter) for x in tensors)
        ):
            return operator(*arguments)
        return function(*arguments)

    return call


def two_streams(args: tuple[Maybe, ...]) -> tuple[Stream, Stream | None]:
    """Image and text stream from the flat arguments of an operator, seven each; no text where its q is None."""
    image, text = Stream(*args[:7]), args[7:]  # type: ignore[arg-type]
    return image, None if text[0] is None else Stream(*text)  # type: ignore[arg-type]


def none_if_empty(x: Tensor) -> Maybe:
    """An operator's outputs cannot be None, so an output that does not exist is an empty tensor: None again."""
    return x if x.numel() else None
