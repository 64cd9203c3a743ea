"""Replay the student's rollout forwards as CUDA graphs, one for each layout of inputs and each number of rows.

`with_cuda_graphs` wraps the velocity field of a rollout in a `CapturedField`, which gives the same velocities without
launching thousands of kernels from Python at each step. A graph replays the captured kernels on the same memory. So
inputs are copied into static tensors, the result is copied out, and the weights must not move: `Backbone.merged` keeps
W + BA in place, and if they did move, everything is captured again. What a forward would read back from the device is
part of the layout (`Family.sync_free`), what it would copy to the device is kept from its first run, and a forward that
still waits for the device is refused before the capture. What cannot be captured runs eagerly, and the log says why.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict, deque
from collections.abc import Hashable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from danceopd.kernels.capture import (
    CapturedCall,
    CudaGraphs,
    GraphCapture,
    NotCapturable,
    capture_forward,
    first_line,
)
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, MergedField
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import FAMILIES
from danceopd.pipelines.two_transformers import SECOND

MIN_CALLS = 8
"""Calls with one layout before it is captured, which costs about two forwards; and never in the update that used it
first. So rare layouts are never captured, and the memory that a gradient takes is known by then."""
MAX_GRAPHS = 32
"""Graphs that are kept; of more, the least recently used is dropped."""

_log = logging.getLogger("danceopd")


class CapturedField:
    """`field` (see `fields.MergedField`) from CUDA graphs; equal to it but for the rounding of a padded batch.

    `min_calls`: see MIN_CALLS; 1 captures at once. `max_graphs`: see MAX_GRAPHS. More than 16 rows are padded to the
    next of eight sizes between two powers of two with copies of the first row: less than an eighth more.
    """

    def __init__(
        self, field: MergedField, graphs: GraphCapture, min_calls: int = MIN_CALLS, max_graphs: int = MAX_GRAPHS
    ) -> None:
        self.field, self.graphs, self.min_calls, self.max_graphs = field, graphs, min_calls, max_graphs
        self.off: str | None = None  # why nothing is captured any more
        self._captured: OrderedDict[Hashable, CapturedCall] = OrderedDict()
        self._counts: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()  # calls, and the weights' version at first
        self._refused: set[Hashable] = set()
        self._recent: deque[tuple[Condition, Condition]] = deque(maxlen=2)  # two: a rollout may be guided
        self._warned: set[str] = set()
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []

    @property
    def backbone(self) -> Backbone:
        """The backbone of the field."""
        return self.field.backbone

    def acting(self) -> AbstractContextManager[None]:
        """The context in which the backbone has this field's weights."""
        return self.field.acting()

    @property
    def graph_count(self) -> int:
        """The number of graphs that are kept."""
        return len(self._captured)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`x (B, …)`, `sigma (B,)` -> velocity, shape of `x`, fp32; a new tensor."""
        if self.off is not None or not len(x) or FAMILIES[condition.family].sync_free is None:
            return self.field(x, sigma, condition)
        padded = self._padded(condition, padded_rows(len(x)))
        key = _layout(x, sigma, padded)
        with self.field.acting():
            self._check_weights()
            call = self._captured.get(key)
            if call is not None:
                self._captured.move_to_end(key)
                call.inputs.fill(x, sigma, padded)
                return call.replay()[: len(x)].clone()
            if not self._due(key):
                return self.backbone.velocity(x, sigma, condition)
            velocity = self._capture(key, x, sigma, padded)
        return velocity[: len(x)] if velocity is not None else self.field(x, sigma, condition)

    def clear(self) -> None:
        """Drop every graph, and with them their memory."""
        self._captured.clear()

    def _padded(self, condition: Condition, rows: int) -> Condition:
        """`condition` with this many rows, and as its family needs it to run without waiting for the device."""
        for given, padded in self._recent:
            if given is condition and len(padded) == rows:
                return padded
        padded, more = condition, rows - len(condition)
        if more:
            padded = condition.rows([*range(len(condition)), *[0] * more])
        sync_free = FAMILIES[condition.family].sync_free
        assert sync_free is not None
        padded = sync_free(padded)
        self._recent.append((condition, padded))
        return padded

    def _check_weights(self) -> None:
        """Drop all graphs if the weights have moved in memory. Called while the field acts."""
        if not self._weights:
            named = self.backbone.transformer.named_parameters()
            self._weights = [*(p for name, p in named if ".lora_" not in name), *self.backbone.transformer.buffers()]
        addresses = [weight.data_ptr() for weight in self._weights]
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def _due(self, key: Hashable) -> bool:
        """Count a call of a layout; whether to capture it now."""
        if key in self._refused:
            return False
        version = self.backbone.parameters(self.field.name)[0]._version
        calls, first = self._counts.pop(key, (0, version))
        self._counts[key] = calls + 1, first
        while len(self._counts) > 64 * self.max_graphs:
            self._counts.popitem(last=False)
        return self.min_calls <= 1 or (calls + 1 >= self.min_calls and version != first)

    def _capture(self, key: Hashable, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor | None:
        """Capture a graph; the velocity of its first run, or None if it cannot be captured."""
        del self._counts[key]
        name = self.backbone.family.name
        if len(self._captured) >= self.max_graphs:
            self._captured.popitem(last=False)
            self._warn(f"rollouts have more than {self.max_graphs} layouts, so some are captured again and again")
        try:
            velocity, call = capture_forward(self.backbone.velocity, self.graphs, x, sigma, condition)
        except NotCapturable as error:
            self._refused.add(key)
            self._warn(f"a rollout of {name} runs without a CUDA graph because {error}")
            return None
        except RuntimeError as error:
            self.off = first_line(error)
            self.clear()
            self._warn(f"rollouts of {name} run without CUDA graphs because a capture failed: {self.off}")
            return None
        self._captured[key] = call
        return velocity

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            _log.warning("rollout.cuda_graphs: %s", sentence)


def padded_rows(rows: int) -> int:
    """How many rows a batch is padded to: its own number up to 16, then the next of eight between two powers of two."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _layout(x: Tensor, sigma: Tensor, condition: Condition) -> Hashable:
    """All that a captured forward depends on besides the numbers in its inputs."""
    tensors = {**condition.kwargs, **{f"shared {name}": value for name, value in condition.shared.items()}}
    tensors["context"] = condition.context
    shapes = tuple((name, _shape(tensors[name])) for name in sorted(tensors))
    fixed = json.dumps(condition.fixed, sort_keys=True)
    return condition.family, len(condition), _shape(x[0]), sigma.dtype, x.device, shapes, fixed


def _shape(value: Tensor | None) -> tuple | None:
    return None if value is None else (tuple(value.shape), value.dtype)


def with_cuda_graphs(
    field: AdapterField | MergedField,
    device: torch.device,
    *,
    enabled: bool,
    compiled: bool = False,
    source_cached: bool = False,
) -> AdapterField | MergedField | CapturedField:
    """The field of a rollout, replayed as CUDA graphs if `enabled` and possible; else `field` itself.

    `enabled`: what `rollout.cuda_graphs` of the recipe says, `auto` settled. `compiled`, `source_cached`: its `compile`
    and `rollout.cache_source`.
    Logs why graphs that are enabled are not possible.
    """
    if not enabled:
        return field
    reason = None
    if device.type != "cuda":
        reason = f"{device.type} has no CUDA graphs"
    elif not isinstance(field, MergedField):
        reason = "the rollout goes through LoRA layers (rollout.merged: false, or parallel: fsdp)"
    elif compiled:
        reason = "compile: true makes its own graphs"
    elif source_cached:
        reason = "rollout.cache_source keeps too much to be copied at each step"
    elif any(hasattr(module, "_hf_hook") for module in field.backbone.transformer.modules()):
        reason = "the transformer's weights are offloaded"
    elif hasattr(field.backbone.transformer, SECOND):
        reason = "the noise level of a row chooses between two transformers"
    elif field.backbone.family.sync_free is None:
        reason = f"a forward of {field.backbone.family.name} waits for the device"
    if reason is None and isinstance(field, MergedField):
        return CapturedField(field, CudaGraphs(device))
    _log.warning("rollout.cuda_graphs: eager rollouts, because %s", reason)
    return field
