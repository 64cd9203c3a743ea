"""Fused GPU kernels for the work around attention, inside stock diffusers transformers.

In: a diffusers transformer. `install(transformer)` replaces attention processors and block forwards, module by module,
with ones that compute the same in fewer passes over memory. Out: the same model, weights, names and LoRA layers
untouched; `uninstall` undoes it. What runs is chosen by `backend.py` (CUDA kernels, Triton, or plain torch, which is
what a CPU always gets). A merge installs them where `autotune.py` finds them right and faster.

Read `functional.py` first (what a model calls), then `reference.py` (what each function means, in plain torch).
See docs/kernels.md. Imports `active`, `check_requested` and `using` from `backend.py`, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from danceopd.kernels.backend import active, check_requested, using

__all__ = ["active", "install", "installed", "uninstall", "using"]


def install(transformer: nn.Module) -> int:
    """Fuse every supported attention module and block; returns how many were changed (0 the second time).

    Modules whose processor, norms or forward somebody else has replaced are left alone. UserError when
    `DANCEOPD_KERNELS` names a backend that cannot run here.
    """
    from danceopd.kernels.blocks import PATCHES, supported
    from danceopd.kernels.processors import fused_processor

    check_requested()  # an error now, not in the first forward
    count = 0
    for module in transformer.modules():
        processor = fused_processor(module)
        if processor is not None:
            module.processor = processor  # type: ignore[assignment]
            count += 1
        if supported(module):
            name, function, _ = PATCHES[type(module)]
            if name not in vars(module):
                setattr(module, name, MethodType(function, module))
                count += 1
    return count


def uninstall(transformer: nn.Module) -> int:
    """Undo `install`; returns how many modules were changed back."""
    from danceopd.kernels.blocks import PATCHES
    from danceopd.kernels.processors import FusedProcessor

    count = 0
    for module in transformer.modules():
        processor = vars(module).get("processor")
        if isinstance(processor, FusedProcessor):
            module.processor = processor.stock
            count += 1
        if type(module) in PATCHES:
            name, function, _ = PATCHES[type(module)]
            if getattr(vars(module).get(name), "__func__", None) is function:
                delattr(module, name)
                count += 1
    return count


@contextmanager
def installed(transformer: nn.Module) -> Iterator[None]:
    """Inside the `with` block the transformer is fused; afterwards it is stock again."""
    install(transformer)
    try:
        yield
    finally:
        uninstall(transformer)
