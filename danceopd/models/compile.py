"""Compile the repeated blocks of a transformer with `torch.compile` (`compile: true` in a recipe).

One block is traced for all of its class, and again for each way it runs: without an adapter, under each adapter, with
merged weights, with a gradient and without. So compiling takes minutes, once, whatever the depth, and pays off on long
runs.
"""

from __future__ import annotations

from torch import nn

from danceopd.errors import UserError

RECOMPILE_LIMIT = 64
"""Ways to run that one class of block may be compiled for; dynamo's own limit is 8."""


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that a transformer repeats, by the names in its diffusers class; UserError if it names none."""
    names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or []
    found = [module for module in transformer.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(f"{type(transformer).__name__} names no repeated blocks; leave out parallel and compile")
    return found


def eager_blocks(transformer: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in transformer.modules():
        vars(block).pop("_compiled_call_impl", None)


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """Compile the repeated blocks in place, each when it first runs; there is a graph for each active adapter."""
    from torch._dynamo import config  # late: a second to import

    config.recompile_limit = max(RECOMPILE_LIMIT, config.recompile_limit)
    for block in repeated_blocks(transformer):
        block.compile(backend=backend)
