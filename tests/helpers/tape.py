"""A stand-in for CUDA graphs on a CPU: a tape of operators and the memory they touch, replayed without Python.

A replay reads and writes the very memory of the capture, which is filled with NaN before each replay, as if another
graph had used it. A number that is read back from the device, or copied from the host, during the capture is refused,
as CUDA refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from danceopd.kernels.capture import NotCapturable

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


class _Waits(TorchFunctionMode):
    """Refuses what makes the host wait, by name: on a CPU these calls never reach the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS or func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise NotCapturable(f"its forward waits for the device ({name})")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise NotCapturable(f"its forward waits for the device ({func._schema.name})")
        if func._schema.name.startswith("aten::index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        ):
            raise NotCapturable("its forward waits for the device (a mask as an index)")
        # detached: a parameter may be given other memory later
        mine = tree_map_only(Tensor, lambda x: x.detach(), (args, kwargs))
        out = func(*args, **kwargs)
        read = {x.untyped_storage().data_ptr() for x in tree_leaves(mine) if isinstance(x, Tensor)}
        fresh = [isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in read for x in tree_leaves(out)]
        self.made += [x for x, new in zip(tree_leaves(out), fresh) if new]
        self.steps.append((func, mine, tree_leaves(out), fresh))
        return out


class Tape:
    """Captures as `cuda_graphs.CudaGraphs` does. `count`: graphs; `replays`: how often one was replayed."""

    def __init__(self) -> None:
        self.count = self.replays = 0

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Waits(), _Recording() as recording:
            out = run()
        self.count += 1

        @torch.no_grad()
        def replay() -> Tensor:
            self.replays += 1
            for made in recording.made:
                if made.is_floating_point() or made.is_complex():
                    made.fill_(float("nan"))
            for func, (args, kwargs), outs, fresh in recording.steps:
                for mine, again, new in zip(outs, tree_leaves(func(*args, **kwargs)), fresh, strict=True):
                    if new:
                        mine.copy_(again)
            return out

        with torch.no_grad():
            for made in recording.made:  # nothing was computed yet
                if made.is_floating_point() or made.is_complex():
                    made.fill_(float("nan"))
        return replay
