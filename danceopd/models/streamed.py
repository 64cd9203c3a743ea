"""A full fine-tuned checkpoint as a velocity field, streamed from disk block by block: a teacher that is no LoRA.

In: the backbone and a `Checkpoint` of the same architecture. Out: `StreamedField`, whose velocity is the checkpoint's
own, bit for bit, without a second model in memory. The backbone's modules run the forward. Right before a block runs,
its weights are swapped for the checkpoint's (memory-mapped on the CPU, copied into one of two buffers of the largest
block's size); right after, the base weights are put back. On CUDA a thread stages the next block in pinned memory
meanwhile and copies it on a side stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.common.messages import few
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.checkpoint import Checkpoint
from danceopd.pipelines.condition import Condition

OUTSIDE = ""
"""Key of the tensors that are swapped for the whole forward: those outside every block."""
ALIGN = 256  # bytes; every tensor starts where an allocator would have put it


class StreamedField:
    """The velocity of `checkpoint` through the modules of `backbone`; see the top of this file.

    `scale` interpolates from the base (0) to the checkpoint (1) and beyond, like the scale of a LoRA. `prefetch`: load
    the next block while one runs; None: on CUDA only. A forward takes `extra_bytes` more memory than the backbone's.
    UserError unless the checkpoint has exactly the backbone's tensors.
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
                f"{checkpoint.path} has another architecture than the base: {len(odd)} tensors differ ({few(odd)}); "
                "give a checkpoint of the same base model"
            )
        self.blocks = _blocks_of(backbone.transformer, tensors)
        self.order: list[str] | None = None  # of the blocks, known after the first forward

    @property
    def extra_bytes(self) -> int:
        """Device memory that a forward takes: the tensors outside blocks and one block, or two with prefetching."""
        tensors = _tensors(self.backbone.transformer)
        sizes = {block: _layout([tensors[n] for n in names])[1] for block, names in self.blocks.items()}
        buffers = 2 if self._prefetches(next(iter(tensors.values())).device) else 1
        return sizes.pop(OUTSIDE, 0) + buffers * max(sizes.values(), default=0)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """`x (B, …)`, `sigma (B,)` -> velocity, shape of `x`, fp32. Also after an error the backbone is as before."""
        with self.backbone.acting_as(None):
            if self.order is None:
                self._trace(x, sigma, condition)
            with _StreamedForward(self):
                return self.backbone.velocity(x, sigma, condition)

    def _trace(self, x: Tensor, sigma: Tensor, condition: Condition) -> None:
        """One forward on the base's weights, to learn the order of the blocks and which of them cannot be streamed.

        A block that is used outside its own forward, or not called at all, is swapped for the whole forward.
        """
        order, inside, held = list[str](), list[str](), set[str]()
        handles = []

        def enter(block: str) -> None:
            order.append(block)
            inside.append(block)

        def leave() -> None:
            inside.pop()

        def check(block: str) -> None:
            if block not in inside:
                held.add(block)

        try:
            for block in self._streamed_blocks():
                module = self.backbone.transformer.get_submodule(block)
                handles.append(module.register_forward_pre_hook(lambda *_, block=block: enter(block)))
                handles.append(module.register_forward_hook(lambda *_: leave()))
                for part in module.modules():
                    if next(part.parameters(recurse=False), None) is not None:
                        handles.append(part.register_forward_pre_hook(lambda *_, block=block: check(block)))
            self.backbone.velocity(x[:1], sigma[:1], condition.rows(slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        for block in held | (set(self._streamed_blocks()) - set(order)):
            self.blocks[OUTSIDE] = self.blocks.get(OUTSIDE, []) + self.blocks.pop(block)
        self.order = [block for block in order if block in self.blocks]

    def _streamed_blocks(self) -> list[str]:
        return [block for block in self.blocks if block != OUTSIDE]

    def _prefetches(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.prefetch is None else self.prefetch


class _StreamedForward:
    """One forward of a `StreamedField`, as a context: hooks that swap weights in and out, and the buffers for them."""

    def __init__(self, field: StreamedField) -> None:
        self.field, self.tensors = field, _tensors(field.backbone.transformer)
        self.device = next(iter(self.tensors.values())).device
        self.swapped: dict[str, list[tuple[Tensor, Tensor]]] = {}  # block -> (tensor, its base data)
        self.handles: list[Any] = []
        self.position = 0  # in the field's order
        self.next: tuple[str, Future[None]] | None = None
        sizes = {block: _layout(self._of(block))[1] for block in field.blocks}
        self.prefetching = field._prefetches(self.device)
        self.worker = ThreadPoolExecutor(1) if self.prefetching else None
        self.side = torch.cuda.Stream(self.device) if self.prefetching and self.device.type == "cuda" else None
        largest = max((size for block, size in sizes.items() if block != OUTSIDE), default=0)
        self.buffers = [_Buffer(largest, self.device, self.side) for _ in range(2 if self.prefetching else 1)]
        self.outside = _Buffer(sizes[OUTSIDE], self.device, None) if OUTSIDE in sizes else None
        if self.side is not None:  # the buffers' memory may still be in use by what ran before
            self.side.wait_stream(torch.cuda.current_stream(self.device))

    def __enter__(self) -> _StreamedForward:
        try:
            if self.outside is not None:
                self.outside.fill(self._sources(OUTSIDE))
                self._swap(OUTSIDE, self.outside)
            for block in self.field._streamed_blocks():
                module = self.field.backbone.transformer.get_submodule(block)
                self.handles.append(module.register_forward_pre_hook(lambda *_, block=block: self._enter(block)))
                self.handles.append(module.register_forward_hook(lambda *_, block=block: self._leave(block)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for block in list(self.swapped):
            self._restore(block)
        if self.next is not None:
            with suppress(Exception):  # a prefetched block that is not needed any more
                self.next[1].result()
        if self.worker is not None:
            self.worker.shutdown()
        if self.side is not None:  # the buffers go back to the main stream's allocator
            torch.cuda.current_stream(self.device).wait_stream(self.side)

    def _enter(self, block: str) -> None:
        buffer = self.buffers[self.position % len(self.buffers)]
        waiting, self.next = self.next, None
        if waiting is not None:
            waiting[1].result()
        if waiting is None or waiting[0] != block:
            buffer.fill(self._sources(block))
        buffer.ready()
        self._swap(block, buffer)
        self.position += 1
        order = self.field.order or []
        if self.worker is not None and self.position < len(order):
            following = order[self.position]
            other = self.buffers[self.position % 2]
            self.next = following, self.worker.submit(other.fill, self._sources(following))

    def _leave(self, block: str) -> None:
        self._restore(block)
        self.buffers[(self.position - 1) % len(self.buffers)].free()

    def _swap(self, block: str, buffer: _Buffer) -> None:
        self.swapped[block] = []
        for tensor, fresh in zip(self._of(block), buffer.views, strict=True):
            base = tensor.data
            if self.field.scale != 1.0:
                fresh.lerp_(base, 1.0 - self.field.scale)
            self.swapped[block].append((tensor, base))
            tensor.data = fresh

    def _restore(self, block: str) -> None:
        for tensor, base in self.swapped.pop(block):
            tensor.data = base

    def _of(self, block: str) -> list[Tensor]:
        return [self.tensors[name] for name in self.field.blocks[block]]

    def _sources(self, block: str) -> list[tuple[Tensor, str, Checkpoint]]:
        return [(self.tensors[name], name, self.field.checkpoint) for name in self.field.blocks[block]]


class _Buffer:
    """A buffer on the device for one block's weights; on CUDA it has a pinned staging buffer and a side stream."""

    def __init__(self, size: int, device: torch.device, side: Any) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.side, self.device = side, device
        self.views: list[Tensor] = []
        self.pinned: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True) if side is not None else None
        self.copied: Any = torch.cuda.Event() if side is not None else None
        self.freed: Any = torch.cuda.Event() if side is not None else None

    @torch.no_grad()
    def fill(self, sources: list[tuple[Tensor, str, Checkpoint]]) -> None:
        """Copy a block's weights into the buffer, in its tensors' own dtypes. May run in the prefetching thread."""
        likes = [like for like, _, _ in sources]
        offsets, size = _layout(likes)
        if self.side is None:
            self.views = _views(self.buffer, offsets, likes)
            for view, (_, name, checkpoint) in zip(self.views, sources):
                view.copy_(checkpoint.tensor(name))
            return
        self.copied.synchronize()  # the last copy out of the staging buffer is done
        for view, (_, name, checkpoint) in zip(_views(self.pinned, offsets, likes), sources):
            view.copy_(checkpoint.tensor(name))
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.freed)  # the last block that computed with this buffer is done
            self.buffer[:size].copy_(self.pinned[:size], non_blocking=True)
            self.copied.record(self.side)
        self.views = _views(self.buffer, offsets, likes)

    def ready(self) -> None:
        """Make the main stream wait until the buffer is filled."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def free(self) -> None:
        """Mark that all work queued on the main stream so far must end before the buffer is filled again."""
        if self.side is not None:
            self.freed.record(torch.cuda.current_stream(self.device))


def _tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters and persistent buffers (not copies) by diffusers name, without those of adapters."""
    state = transformer.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}


def _blocks_of(transformer: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Block path -> names of its tensors. Blocks are the top modules, and the members of module lists and dicts.

    OUTSIDE holds the tensors of none.
    """
    paths: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                visit(child, f"{prefix}{name}.")
            else:
                paths.append(prefix + name)

    visit(transformer, "")
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = next((path for path in paths if name.startswith(f"{path}.")), OUTSIDE)
        blocks.setdefault(block, []).append(name)
    return blocks


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
