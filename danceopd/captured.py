"""The student's walk as CUDA graphs: one for each layout of the latents and the condition and each number of rows.

A forward launches thousands of kernels from Python; a graph launches the same kernels on the same memory at once. So
inputs are copied to where they were recorded, the answer is copied out, and weights must not move: `Backbone.merged`
keeps W + BA in place, and where they did move everything is recorded anew. What a forward would read back from the
device is part of the layout (`Family.still`), what it would copy to the device is kept from its first run, and a
forward that still waits for the device is refused before it is recorded. What cannot be recorded runs as before.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danceopd.attention.masks import unasked
from danceopd.backbone import Backbone
from danceopd.fields import AdapterField, MergedField
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition
from danceopd.recipe import Recipe
from danceopd.steady import anew

AFTER = 8
"""Times that a layout is asked before it is recorded, which costs about two forwards, and never in the update that asks
for it first: what is rare is never recorded, and the memory that a gradient takes is known by then."""
MOST = 32
"""Graphs that are kept; of more, the one that was not asked for longest is dropped."""

_log = logging.getLogger("danceopd")
Run = Callable[[], Tensor]


class Refused(Exception):
    """Why a forward is not recorded, in words that follow "because"."""


class Recorder(Protocol):
    """Makes a run on fixed tensors repeatable without Python."""

    def record(self, run: Run) -> Run:
        """What repeats `run` on the memory that it reads now, and answers with one tensor, overwritten each time.

        Refused when it cannot be recorded but nothing is harmed.
        """
        ...


class CudaGraphs:
    """CUDA graphs on `device` that share one pool of memory: each answer is read before another graph runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self._peak = 0

    def record(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                self._rehearse(run)
            try:
                # other threads (a gathering's watchdog) may go on asking their own streams
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    out = run()
            finally:
                torch.cuda.set_stream(here)  # a capture that fails leaves its own stream current
            here.wait_stream(self.stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _rehearse(self, run: Run) -> None:
        """One run on the stream that records, which must not wait for the device and leaves room for its memory."""
        before, mode = torch.cuda.memory_allocated(), torch.cuda.get_sync_debug_mode()
        self._peak = max(self._peak, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except torch.cuda.OutOfMemoryError as error:
            raise Refused("there is no memory for a graph of this size") from error
        except RuntimeError as error:
            raise Refused(f"its forward waits for the device ({_line(error)})") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        needs = torch.cuda.max_memory_allocated() - before
        spare = torch.cuda.get_device_properties(self.device).total_memory - self._peak
        if needs > spare:
            raise Refused(f"a graph needs {needs / 2**30:.1f} GiB of its own and {max(spare, 0) / 2**30:.1f} are spare")


@dataclass(frozen=True)
class _Inputs:
    """Where a recorded forward reads its inputs."""

    x: Tensor
    sigma: Tensor
    condition: Condition

    def fill(self, x: Tensor, sigma: Tensor, asked: Condition) -> None:
        """Copy inputs in; rows beyond those of `x` are copies of its first."""
        for static, value in ((self.x, x), (self.sigma, sigma)):
            static[: len(x)].copy_(value)
            static[len(x) :].copy_(value[:1].expand_as(static[len(x) :]))
        mine = self.condition
        pairs = [(mine.context, asked.context)]
        pairs += [(mine.kwargs[name], value) for name, value in asked.kwargs.items()]
        pairs += [(mine.shared[name], value) for name, value in asked.shared.items()]
        for place, given in pairs:
            if place is not None and given is not None:
                place.copy_(given)


class _Graph(NamedTuple):
    """One recorded forward. `held`: memory that it reads and others own."""

    inputs: _Inputs
    replay: Run
    held: list[Any]


class CapturedField:
    """`field` (see `fields.MergedField`) from recordings; equal to it but for the rounding of a padded batch.

    `after`: see AFTER; 1 records at once. `most`: graphs kept. More than 16 rows are padded to the
    next of eight sizes an octave, with copies of the first row: less than an eighth more.
    """

    def __init__(self, field: MergedField, recorder: Recorder, after: int = AFTER, most: int = MOST) -> None:
        self.field, self.recorder, self.after, self.most = field, recorder, after, most
        self.off: str | None = None  # why nothing is recorded any more
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._asked: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()  # times, and at which weights first
        self._refused: set[Hashable] = set()
        self._last: deque[tuple[Condition, Condition]] = deque(maxlen=2)  # two: a walk may be guided
        self._said: set[str] = set()
        self._weights: list[Tensor] = []
        self._places: list[int] = []

    @property
    def backbone(self) -> Backbone:
        """The backbone of the field."""
        return self.field.backbone

    def acting(self) -> AbstractContextManager[None]:
        """Inside, the backbone is what this field asks."""
        return self.field.acting()

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`x (B, …)`, `sigma (B,)` -> velocity, shape of `x`, fp32; a tensor of its own."""
        if self.off is not None or not len(x):
            return self.field(x, sigma, condition)
        asked = self._still(condition, padded(len(x)))
        key = _layout(x, sigma, asked)
        with self.field.acting():
            self._stay()
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
                graph.inputs.fill(x, sigma, asked)
                return graph.replay()[: len(x)].clone()
            if not self._due(key):
                return self.backbone.velocity(x, sigma, condition)
            answer = self._record(key, x, sigma, asked)
        return answer[: len(x)] if answer is not None else self.field(x, sigma, condition)

    def clear(self) -> None:
        """Drop every graph, and with them their memory."""
        self._graphs.clear()

    def _still(self, condition: Condition, rows: int) -> Condition:
        for seen, asked in self._last:
            if seen is condition and len(asked) == rows:
                return asked
        asked, more = condition, rows - len(condition)
        if more:
            asked = condition.rows([*range(len(condition)), *[0] * more])
        asked = FAMILIES[condition.family].still(asked)
        self._last.append((condition, asked))
        return asked

    def _stay(self) -> None:
        """Drop what was recorded on weights that are elsewhere now. Call it while they act."""
        if not self._weights:
            named = self.backbone.transformer.named_parameters()
            self._weights = [*(p for name, p in named if ".lora_" not in name), *self.backbone.transformer.buffers()]
        places = [weight.data_ptr() for weight in self._weights]
        if places != self._places:
            self.clear()
            self._places = places

    def _due(self, key: Hashable) -> bool:
        if key in self._refused:
            return False
        weights = self.backbone.parameters(self.field.name)[0]._version
        times, first = self._asked.pop(key, (0, weights))
        self._asked[key] = times + 1, first
        while len(self._asked) > 64 * self.most:
            self._asked.popitem(last=False)
        return self.after <= 1 or (times + 1 >= self.after and weights != first)

    def _record(self, key: Hashable, x: Tensor, sigma: Tensor, asked: Condition) -> Tensor | None:
        """Make the graph; its first run's answer, None where there is none."""
        del self._asked[key]
        rows = len(asked)
        if len(self._graphs) >= self.most:
            self._graphs.popitem(last=False)
            self._say(f"more than {self.most} layouts are walked, so some are recorded again and again")
        static = replace(asked._map(_own), shared={name: _own(value) for name, value in asked.shared.items()})
        inputs = _Inputs(x.new_empty(rows, *x.shape[1:]), sigma.new_empty(rows), static)
        inputs.fill(x, sigma, asked)
        constants, kept = Constants(), list[Any]()

        def run() -> Tensor:
            with anew(), constants:
                return self.backbone.velocity(inputs.x, inputs.sigma, inputs.condition)

        def held() -> Tensor:
            with Held() as reads:
                kept.append(reads.found)
                return run()

        try:
            with unasked():
                answer = run().clone()  # the last to make what is made once
                constants.closed = True
                replay = self.recorder.record(held)
        except Refused as error:
            self._refused.add(key)
            self._say(f"a walk of {self.backbone.family.name} runs without a CUDA graph because {error}")
            return None
        except RuntimeError as error:
            self.off = _line(error)
            self.clear()
            name = self.backbone.family.name
            self._say(f"walks of {name} run without CUDA graphs because recording one failed: {self.off}")
            return None
        self._graphs[key] = _Graph(inputs, replay, [*kept, constants.made])
        return answer

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            _log.warning("rollout.captured: %s", sentence)


def padded(rows: int) -> int:
    """The number of rows that this many are recorded as: their own up to 16, then eight sizes an octave."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _own(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _layout(x: Tensor, sigma: Tensor, asked: Condition) -> Hashable:
    """All that a recorded forward has in it besides the numbers in its inputs."""
    tensors = {**asked.kwargs, **{f"shared {name}": value for name, value in asked.shared.items()}}
    tensors["context"] = asked.context
    shapes = tuple((name, _shape(tensors[name])) for name in sorted(tensors))
    fixed = json.dumps(asked.fixed, sort_keys=True)
    return asked.family, len(asked), _shape(x[0]), sigma.dtype, x.device, shapes, fixed


def _shape(value: Tensor | None) -> tuple | None:
    return None if value is None else (tuple(value.shape), value.dtype)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


class Constants(TorchFunctionMode):
    """Tensors that a forward makes of plain numbers: made at its first run, found again once it is `closed`.

    Making one copies from the host, which a graph cannot hold. Each use is a copy on the device.
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
                raise Refused(f"its forward makes another tensor of plain numbers each time ({key[:60]})")
            self.made[key] = func(*args, **kwargs)
        return self.made[key].clone()


class Held(TorchDispatchMode):
    """Memory that operators read and did not make: kept, so that a cache that forgets it does not free it."""

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
                place = value.untyped_storage().data_ptr()
                if place not in self.found:
                    self._made.add(place)
        return out


def walking(
    recipe: Recipe, field: AdapterField | MergedField, device: torch.device
) -> AdapterField | MergedField | CapturedField:
    """The field that walks, recorded where recipe and machine allow it (`rollout.captured`); else `field` itself.

    Why not is said where the recipe asked for it.
    """
    walk = recipe.rollout
    if not walk.captured:
        return field
    reason = None
    if device.type != "cuda":
        reason = f"{device.type} has no CUDA graphs"
    elif not isinstance(field, MergedField):
        reason = "the walk goes through LoRA layers (rollout.merged: false, or parallel: fsdp)"
    elif recipe.compile:
        reason = "compile: true makes its own graphs"
    elif walk.keep_source:
        reason = "rollout.keep_source keeps too much to be copied at each step"
    elif any(hasattr(module, "_hf_hook") for module in field.backbone.transformer.modules()):
        reason = "the transformer's weights are offloaded"
    if reason is None and isinstance(field, MergedField):
        return CapturedField(field, CudaGraphs(device))
    _log.warning("rollout.captured: no CUDA graphs, %s", reason)
    return field
