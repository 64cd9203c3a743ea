"""A whole checkpoint as a velocity field, without a second resident model.

The backbone's own modules run the forward. Right before a block runs, its weights are swapped for the checkpoint's
(memory-mapped on the CPU, copied into one of two buffers of the largest block's size); right after, the pristine
ones stand there again, untouched. On CUDA the next block is staged in pinned memory by a thread and copied on a side
stream meanwhile. Same modules, same weights, same kernels: the velocity is the checkpoint's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.backbone import Backbone
from danceopd.checkpoint import Checkpoint
from danceopd.errors import UserError
from danceopd.lora_file import few
from danceopd.pipelines.record import Condition

ROOT = ""
ALIGN = 256  # bytes; every tensor starts where an allocator would have put it


class StreamedField:
    """The velocity of `checkpoint` through `backbone`'s modules; see the module's docstring.

    `scale` walks from the base (0) to the checkpoint (1) and beyond, as an adapter's does. `prefetch` None: on
    CUDA. A forward takes `extra_bytes` more than the backbone. Tensors outside every block are held for the whole
    forward. UserError when the tensors are not the backbone's, N of N.
    """

    def __init__(
        self, backbone: Backbone, checkpoint: Checkpoint, scale: float = 1.0, prefetch: bool | None = None
    ) -> None:
        self.backbone, self.checkpoint, self.scale, self.prefetch = backbone, checkpoint, scale, prefetch
        tensors = _tensors(backbone.transformer)
        odd = tensors.keys() ^ checkpoint.shapes.keys()
        odd |= {n for n in tensors.keys() - odd if tuple(tensors[n].shape) != checkpoint.shapes[n]}
        if odd:
            raise UserError(
                f"{checkpoint.path} is no model of this base's architecture: {len(odd)} tensors differ ({few(odd)})"
            )
        self.units = _units(backbone.transformer, tensors)
        self.order: list[str] | None = None  # of the blocks in a forward, once one has been seen

    @property
    def extra_bytes(self) -> int:
        """Memory on the device that a forward takes: the root's tensors and one block, or two with prefetching."""
        tensors = _tensors(self.backbone.transformer)
        sizes = {unit: _layout([tensors[n] for n in names])[1] for unit, names in self.units.items()}
        lanes = 2 if self._prefetches(next(iter(tensors.values())).device) else 1
        return sizes.pop(ROOT, 0) + lanes * max(sizes.values(), default=0)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`x (B, …)`, `sigma (B,)` -> velocity, shape of `x`, fp32. The backbone is as before, come what may."""
        with self.backbone.acting_as(None):
            if self.order is None:
                self._learn(x, sigma, condition)
            with _Pass(self):
                return self.backbone.velocity(x, sigma, condition)

    def _learn(self, x: Tensor, sigma: Tensor, condition: Condition) -> None:
        """One forward on the base's own weights: in which order the blocks run, and which tensors are used
        outside their block's forward (or in no forward at all), so that they must be held throughout."""
        order, inside, strays = list[str](), list[str](), set[str]()
        handles = []

        def enter(unit: str) -> None:
            order.append(unit)
            inside.append(unit)

        def leave() -> None:
            inside.pop()

        def check(unit: str) -> None:
            if unit not in inside:
                strays.add(unit)

        try:
            for unit in self._blocks():
                module = self.backbone.transformer.get_submodule(unit)
                handles.append(module.register_forward_pre_hook(lambda *_, unit=unit: enter(unit)))
                handles.append(module.register_forward_hook(lambda *_: leave()))
                for part in module.modules():
                    if next(part.parameters(recurse=False), None) is not None:
                        handles.append(part.register_forward_pre_hook(lambda *_, unit=unit: check(unit)))
            self.backbone.velocity(x[:1], sigma[:1], condition.rows(slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        for unit in strays | (set(self._blocks()) - set(order)):
            self.units[ROOT] = self.units.get(ROOT, []) + self.units.pop(unit)
        self.order = [unit for unit in order if unit in self.units]

    def _blocks(self) -> list[str]:
        return [unit for unit in self.units if unit != ROOT]

    def _prefetches(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.prefetch is None else self.prefetch


class _Pass:
    """One forward: hooks that swap weights in and out, and the two buffers they come through."""

    def __init__(self, field: StreamedField) -> None:
        self.field, self.tensors = field, _tensors(field.backbone.transformer)
        self.device = next(iter(self.tensors.values())).device
        self.held: dict[str, list[tuple[Tensor, Tensor]]] = {}  # unit -> (the tensor, its pristine data)
        self.handles: list[Any] = []
        self.position = 0  # in the field's order
        self.next: tuple[str, Future[None]] | None = None
        sizes = {unit: _layout(self._of(unit))[1] for unit in field.units}
        self.prefetching = field._prefetches(self.device)
        self.worker = ThreadPoolExecutor(1) if self.prefetching else None
        self.side = torch.cuda.Stream(self.device) if self.prefetching and self.device.type == "cuda" else None
        largest = max((size for unit, size in sizes.items() if unit != ROOT), default=0)
        self.lanes = [_Lane(largest, self.device, self.side) for _ in range(2 if self.prefetching else 1)]
        self.root = _Lane(sizes[ROOT], self.device, None) if ROOT in sizes else None
        if self.side is not None:  # the buffers' memory may still be in use by what ran before
            self.side.wait_stream(torch.cuda.current_stream(self.device))

    def __enter__(self) -> _Pass:
        try:
            if self.root is not None:
                self.root.fill(self._sources(ROOT))
                self._swap(ROOT, self.root)
            for unit in self.field._blocks():
                module = self.field.backbone.transformer.get_submodule(unit)
                self.handles.append(module.register_forward_pre_hook(lambda *_, unit=unit: self._enter(unit)))
                self.handles.append(module.register_forward_hook(lambda *_, unit=unit: self._leave(unit)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for unit in list(self.held):
            self._restore(unit)
        if self.next is not None:
            with suppress(Exception):  # a block nobody asked for any more
                self.next[1].result()
        if self.worker is not None:
            self.worker.shutdown()
        if self.side is not None:  # the buffers go back to the main stream's allocator
            torch.cuda.current_stream(self.device).wait_stream(self.side)

    def _enter(self, unit: str) -> None:
        lane = self.lanes[self.position % len(self.lanes)]
        waiting, self.next = self.next, None
        if waiting is not None:
            waiting[1].result()
        if waiting is None or waiting[0] != unit:
            lane.fill(self._sources(unit))
        lane.ready()
        self._swap(unit, lane)
        self.position += 1
        order = self.field.order or []
        if self.worker is not None and self.position < len(order):
            following = order[self.position]
            other = self.lanes[self.position % 2]
            self.next = following, self.worker.submit(other.fill, self._sources(following))

    def _leave(self, unit: str) -> None:
        self._restore(unit)
        self.lanes[(self.position - 1) % len(self.lanes)].free()

    def _swap(self, unit: str, lane: _Lane) -> None:
        self.held[unit] = []
        for tensor, fresh in zip(self._of(unit), lane.views, strict=True):
            pristine = tensor.data
            if self.field.scale != 1.0:
                fresh.lerp_(pristine, 1.0 - self.field.scale)
            self.held[unit].append((tensor, pristine))
            tensor.data = fresh

    def _restore(self, unit: str) -> None:
        for tensor, pristine in self.held.pop(unit):
            tensor.data = pristine

    def _of(self, unit: str) -> list[Tensor]:
        return [self.tensors[name] for name in self.field.units[unit]]

    def _sources(self, unit: str) -> list[tuple[Tensor, str, Checkpoint]]:
        return [(self.tensors[name], name, self.field.checkpoint) for name in self.field.units[unit]]


class _Lane:
    """A buffer on the device for one block's weights, with a pinned twin and a side stream on CUDA."""

    def __init__(self, size: int, device: torch.device, side: Any) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.side, self.device = side, device
        self.views: list[Tensor] = []
        self.pinned: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True) if side is not None else None
        self.copied: Any = torch.cuda.Event() if side is not None else None
        self.freed: Any = torch.cuda.Event() if side is not None else None

    @torch.no_grad()
    def fill(self, sources: list[tuple[Tensor, str, Checkpoint]]) -> None:
        """Bring a block's weights here, in its tensors' own dtypes. May run in the prefetching thread."""
        likes = [like for like, _, _ in sources]
        offsets, size = _layout(likes)
        if self.side is None:
            self.views = _views(self.buffer, offsets, likes)
            for view, (_, name, checkpoint) in zip(self.views, sources):
                view.copy_(checkpoint.tensor(name))
            return
        self.copied.synchronize()  # the pinned twin's last copy has left it
        for view, (_, name, checkpoint) in zip(_views(self.pinned, offsets, likes), sources):
            view.copy_(checkpoint.tensor(name))
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.freed)  # the last block that computed with this buffer is done
            self.buffer[:size].copy_(self.pinned[:size], non_blocking=True)
            self.copied.record(self.side)
        self.views = _views(self.buffer, offsets, likes)

    def ready(self) -> None:
        """What the main stream does from here on sees the filled buffer."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def free(self) -> None:
        """What the main stream was given so far is the last to read the buffer."""
        if self.side is not None:
            self.freed.record(torch.cuda.current_stream(self.device))


def _tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """The base's parameters and persistent buffers by diffusers name, adapters looked through; live objects."""
    state = transformer.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}


def _units(transformer: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Block path -> its tensors' names: the modules that are called, looking into lists and dictionaries of
    modules; ROOT holds what belongs to none."""
    paths: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                walk(child, f"{prefix}{name}.")
            else:
                paths.append(prefix + name)

    walk(transformer, "")
    units: dict[str, list[str]] = {}
    for name in names:
        unit = next((path for path in paths if name.startswith(f"{path}.")), ROOT)
        units.setdefault(unit, []).append(name)
    return units


def _layout(likes: list[Tensor]) -> tuple[list[int], int]:
    """Where each tensor starts in one buffer, and the buffer's size, in bytes."""
    offsets, end = [], 0
    for like in likes:
        offsets.append(end)
        end += -(-like.numel() * like.element_size() // ALIGN) * ALIGN
    return offsets, end


def _views(buffer: Any, offsets: list[int], likes: list[Tensor]) -> list[Tensor]:
    return [
        buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
        for start, like in zip(offsets, likes)
    ]
