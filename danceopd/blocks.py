"""The blocks that a transformer repeats: which they are, and compiling them.

One block is traced for all of its kind, and again for each way that it runs: bare, under each adapter, with merged
weights, with a gradient and without. So compiling costs minutes once, whatever the depth, and earns them on long runs.
"""

from __future__ import annotations

from torch import nn

from danceopd.errors import UserError

GRAPHS = 64
"""Ways to run that one kind of block may be compiled for; dynamo's own limit is 8."""


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that a transformer repeats, as its diffusers class names them; UserError where it names none."""
    names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or []
    found = [module for module in transformer.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(f"{type(transformer).__name__} names no repeated blocks; leave out parallel and compile")
    return found


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` of the repeated blocks, each when it first runs; there is a graph for each adapter that acts."""
    from torch._dynamo import config  # late: a second to import

    config.recompile_limit = max(GRAPHS, config.recompile_limit)
    for block in repeated_blocks(transformer):
        block.compile(backend=backend)
