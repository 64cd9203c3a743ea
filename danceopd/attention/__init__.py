"""Fused kernels for what stands around attention, inside stock diffusers transformers.

`install(transformer)` swaps attention processors and block forwards, module by module, for ones that do the same in
fewer passes over memory; `uninstall` leaves no trace. Weights, names and adapters stay where they are. What runs is
decided by `choose`: CUDA kernels, Triton, or plain torch, which is what a CPU always gets. See docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from .choose import active, demand, using

__all__ = ["active", "install", "installed", "uninstall", "using"]


def install(transformer: nn.Module) -> int:
    """Fuse every attention module and block that is covered; how many changed. Installing twice changes none.

    Modules whose processor, norms or forward somebody else has replaced are left alone. UserError when
    `DANCEOPD_KERNELS` asks for what cannot run here.
    """
    from .blocks import PATCHES, covered
    from .processors import fused_for

    demand()  # what the environment asks for in vain is an error now, not in the first forward
    count = 0
    for module in transformer.modules():
        processor = fused_for(module)
        if processor is not None:
            module.processor = processor  # type: ignore[assignment]
            count += 1
        if covered(module):
            name, function, _ = PATCHES[type(module)]
            if name not in vars(module):
                setattr(module, name, MethodType(function, module))
                count += 1
    return count


def uninstall(transformer: nn.Module) -> int:
    """Undo `install`; how many modules changed back."""
    from .blocks import PATCHES
    from .processors import Fused

    count = 0
    for module in transformer.modules():
        processor = vars(module).get("processor")
        if isinstance(processor, Fused):
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
    """Inside, the transformer is fused."""
    install(transformer)
    try:
        yield
    finally:
        uninstall(transformer)
