"""Capture a forward without a gradient as a CUDA graph, which replays its kernels without Python.

`capture_forward` copies the inputs into static tensors, runs the forward once eagerly, which makes the tensors that it
would copy from the host, and captures a second run that reads the same memory. A forward that waits for the device is
refused before the capture. `danceopd.models.cuda_graphs` keeps captured forwards by layout; the trial in `autotune.py`
times one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danceopd.kernels.masks import masks_unread
from danceopd.pipelines.condition import Condition

Run = Callable[[], Tensor]
Velocity = Callable[[Tensor, Tensor, Condition], Tensor]


class NotCapturable(Exception):
    """Why a forward is not captured, in words that follow "because"."""


class GraphCapture(Protocol):
    """Turns a run on fixed tensors into one that repeats without Python: `CudaGraphs`, or a stand-in in tests."""

    def capture(self, run: Run) -> Run:
        """A function that repeats `run` on the memory it reads now; it returns one tensor, overwritten each time.

        NotCapturable if the run cannot be captured and no harm is done.
        """
        ...


class CudaGraphs:
    """CUDA graphs on `device` that share one memory pool: each result is read before another graph runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._peak = 0

    def capture(self, run: Run) -> Run:
        """See `GraphCapture`. Runs it once before, to see that it can be captured."""
        with torch.cuda.device(self.device):
            here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                self._dry_run(run)
            try:
                # other threads (NCCL's watchdog, for example) may go on querying their own streams
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    out = run()
            finally:
                torch.cuda.set_stream(here)  # a capture that fails leaves its own stream current
            here.wait_stream(self.stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _dry_run(self, run: Run) -> None:
        """One run on the capture stream: it must not wait for the device, and its memory must fit. NotCapturable."""
        before, mode = torch.cuda.memory_allocated(), torch.cuda.get_sync_debug_mode()
        self._peak = max(self._peak, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except torch.cuda.OutOfMemoryError as error:
            raise NotCapturable("there is no memory for a graph of this size") from error
        except RuntimeError as error:
            raise NotCapturable(f"its forward waits for the device ({first_line(error)})") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        needs = torch.cuda.max_memory_allocated() - before
        spare = torch.cuda.get_device_properties(self.device).total_memory - self._peak
        if needs > spare:
            needed, free = needs / 2**30, max(spare, 0) / 2**30
            raise NotCapturable(f"a graph needs {needed:.1f} GiB of its own and {free:.1f} GiB are spare")


@dataclass(frozen=True)
class StaticInputs:
    """The tensors that a captured forward reads its inputs from."""

    x: Tensor
    sigma: Tensor
    condition: Condition

    def fill(self, x: Tensor, sigma: Tensor, condition: Condition) -> None:
        """Copy inputs in; rows beyond those of `x` become copies of its first row."""
        for static, value in ((self.x, x), (self.sigma, sigma)):
            static[: len(x)].copy_(value)
            static[len(x) :].copy_(value[:1].expand_as(static[len(x) :]))
        mine = self.condition
        pairs = [(mine.context, condition.context)]
        pairs += [(mine.kwargs[name], value) for name, value in condition.kwargs.items()]
        pairs += [(mine.shared[name], value) for name, value in condition.shared.items()]
        for static_tensor, given in pairs:
            if static_tensor is not None and given is not None:
                static_tensor.copy_(given)


class CapturedCall(NamedTuple):
    """One captured forward. `kept`: memory that it reads and others own, kept alive with the graph."""

    inputs: StaticInputs
    replay: Run
    kept: list[Any]


@torch.no_grad()
def capture_forward(
    velocity: Velocity, graphs: GraphCapture, x: Tensor, sigma: Tensor, condition: Condition
) -> tuple[Tensor, CapturedCall]:
    """The velocity of a first, eager run, and the captured forward; `condition` may have more rows than `x`.

    NotCapturable where the forward cannot be captured and no harm is done, RuntimeError where a capture failed.
    """
    rows, shared = len(condition), {name: _copy(value) for name, value in condition.shared.items()}
    static = replace(condition._map(_copy), shared=shared)
    inputs = StaticInputs(x.new_empty(rows, *x.shape[1:]), sigma.new_empty(rows), static)
    inputs.fill(x, sigma, condition)
    constants, kept = ConstantInputs(), list[Any]()

    def run() -> Tensor:
        with constants:
            return velocity(inputs.x, inputs.sigma, inputs.condition)

    def run_and_keep() -> Tensor:
        with StoragesRead() as storages:
            kept.append(storages.found)
            return run()

    with masks_unread():
        first = run().clone()  # the run that makes the constants
        constants.closed = True
        replay = graphs.capture(run_and_keep)
    return first, CapturedCall(inputs, replay, [*kept, constants.made])


class ConstantInputs(TorchFunctionMode):
    """Keeps the tensors that a forward makes of plain numbers (`torch.tensor([1, 2])`), by their arguments.

    Making one copies from the host, which a graph cannot hold. So they are made in the first run, and once `closed` is
    set each use is a copy on the device; NotCapturable for one that was not made before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Hashable, Tensor] = {}
        self.closed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = bool(args) and isinstance(args[0], int | float | list | tuple)
        if func not in (torch.tensor, torch.as_tensor) or not plain:
            return func(*args, **kwargs)
        key = repr((args, sorted(kwargs.items(), key=lambda item: item[0])))
        if key not in self.made:
            if self.closed:
                raise NotCapturable(f"its forward makes another tensor of plain numbers each time ({key[:60]})")
            self.made[key] = func(*args, **kwargs)
        return self.made[key].clone()


class StoragesRead(TorchDispatchMode):
    """Collects the memory that operators read and did not make, so that it can be kept alive with the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Any] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self._made:
                self.found[value.untyped_storage().data_ptr()] = value.untyped_storage()
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                address = value.untyped_storage().data_ptr()
                if address not in self.found:
                    self._made.add(address)
        return out


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def first_line(error: Exception) -> str:
    """The first line of an error, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
