"""`Condition`: the inputs of a transformer call besides the noisy latents and the time, a row for each picture.

`record` makes them, `stack` joins conditions of equal layout into a batch, `state` and `from_state` save and load them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from danceopd.errors import UserError


@dataclass(frozen=True, eq=False)
class Condition:
    """What a transformer call gets besides the noisy latents and the time: prompt states, source tokens, positions.

    `family` is a key of `FAMILIES`, `shape` the shape of one row's latents (e.g. `(16, 32)`), `kwargs` the
    transformer arguments that have a row for each picture (batch dimension 0), `context` the tokens `(B, m, C)` of
    the source pictures in their order, or None without one; they stand before or after the latents, as the family's
    `velocity` puts them. `shared` are tensors that all rows use alike (position tables without a batch dimension),
    `fixed` plain values that JSON can hold (such as image shapes; `references` where an edit has several sources).
    Prompt states of several layers are one tensor (B, tokens, layers, C), see `joined_layers`. A cache that the stock
    call fills while it runs is no part of a condition.
    `ragged` names the kwargs whose dimension 1 counts text tokens: rows of different lengths are padded with
    zeros (False) when they are stacked, so they need a mask or a length among the kwargs.
    """

    family: str
    shape: tuple[int, ...]
    kwargs: dict[str, Tensor | None]
    context: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    ragged: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return next(len(value) for value in (*self.kwargs.values(), self.context) if value is not None)

    @cached_property
    def layout(self) -> tuple:
        """What two conditions must have in common to share a batch; hashable.

        Shapes and dtypes of a row, the fixed values, and a checksum of `shared` and of every `*_ids` tensor:
        transformers read positions from row 0 only, so two sources with as many tokens but another grid must
        not share a batch.
        """
        kwargs = tuple((key, self._part(key)) for key in sorted(self.kwargs))
        shared = tuple((key, _layout(self.shared[key], True)) for key in sorted(self.shared))
        fixed = json.dumps(self.fixed, sort_keys=True)
        return self.family, self.shape, kwargs, _layout(self.context), shared, fixed, self.ragged

    def rows(self, index: slice | list[int] | Tensor) -> Condition:
        """The rows at `index` (slice: views; list of int or LongTensor: copies), as a Condition."""
        if isinstance(index, list):
            index = torch.tensor(index, dtype=torch.long)
        if isinstance(index, Tensor):
            device = next(v for v in (*self.kwargs.values(), self.context) if v is not None).device
            index = index.to(device)
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str | None = None) -> Condition:
        """The same condition with every tensor on `device`."""
        shared = {key: value.to(device) for key, value in self.shared.items()}
        return replace(self._map(lambda value: value.to(device)), shared=shared)

    def state(self) -> dict[str, Tensor]:
        """A flat dict of contiguous tensors, ready for safetensors; `from_state` is its inverse."""
        header = {"family": self.family, "shape": self.shape, "fixed": self.fixed, "ragged": self.ragged}
        state = {"facts": torch.tensor(list(json.dumps(header, sort_keys=True).encode()), dtype=torch.uint8)}
        for key, value in self.kwargs.items():
            name, value = ("none." + key, torch.zeros(0)) if value is None else ("kwargs." + key, value)
            state[name] = value.detach().contiguous()
        state.update({"shared." + key: value.detach().contiguous() for key, value in self.shared.items()})
        if self.context is not None:
            state["context"] = self.context.detach().contiguous()
        return state

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Condition:
        """The condition whose `state()` this is; KeyError when it is not one."""
        kwargs: dict[str, Tensor | None] = {}
        shared: dict[str, Tensor] = {}
        for key in state:
            kind, _, name = key.partition(".")
            if name and kind in ("none", "kwargs"):
                kwargs[name] = state[key] if kind == "kwargs" else None
            elif name and kind == "shared":
                shared[name] = state[key]
        header = json.loads(bytes(state["facts"].tolist()))
        shape, ragged = tuple(header["shape"]), tuple(header["ragged"])
        return cls(header["family"], shape, kwargs, state.get("context"), shared, header["fixed"], ragged)

    def _part(self, key: str) -> tuple | None:
        return _layout(self.kwargs[key], key.endswith("_ids"), key in self.ragged)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        kwargs = {key: None if value is None else change(value) for key, value in self.kwargs.items()}
        return replace(self, kwargs=kwargs, context=None if self.context is None else change(self.context))


def _layout(value: Tensor | None, content: bool = False, ragged: bool = False) -> tuple | None:
    """(shape of a row, dtype, checksum of row 0 where `content` counts); a ragged row's length does not count."""
    if value is None:
        return None
    checksum = 0
    if content and len(value):  # as bytes, since numpy has no bfloat16
        checksum = zlib.crc32(value[0].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return tuple(value.shape[2 if ragged else 1 :]), str(value.dtype).removeprefix("torch."), checksum


def stack(conditions: Sequence[Condition]) -> Condition:
    """One condition with the rows of all, in order; UserError when their layouts differ."""
    if not conditions:
        raise ValueError("stack needs at least one condition")
    first = conditions[0]
    if len(conditions) == 1:
        return first
    for number, other in enumerate(conditions[1:], start=1):
        if other.layout != first.layout:
            raise UserError(
                f"condition {number} cannot share a batch with condition 0: {_difference(first, other)}; give all "
                f"rows of a batch the same picture size, source size and max_sequence_length"
            )
    kwargs: dict[str, Tensor | None] = {}
    for key, value in first.kwargs.items():
        parts = [c.kwargs[key] for c in conditions]
        kwargs[key] = None if value is None else torch.cat(_padded(parts) if key in first.ragged else parts)  # type: ignore[arg-type]
    context = None if first.context is None else torch.cat([c.context for c in conditions])  # type: ignore[misc]
    return replace(first, kwargs=kwargs, context=context)


def joined_layers(layers: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """A list of prompt states (B, tokens, C) as one tensor (B, tokens, layers, C) for a condition's `kwargs`.

    Stock pipelines give the last layers again and again: each tensor is kept once, and the list says which of them
    stands at each place, for `fixed`. `split_layers` is the inverse.
    """
    once = list({id(layer): layer for layer in layers}.values())
    return torch.stack(once, dim=2), [next(i for i, one in enumerate(once) if one is layer) for layer in layers]


def split_layers(joined: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The list of prompt states (B, tokens, C) that `joined_layers` was given."""
    layers = joined.unbind(2)
    return [layers[place] for place in places]


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts padded with zeros along dimension 1 to the longest."""
    longest = max(part.shape[1] for part in parts)
    return [
        torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], dim=1)
        if part.shape[1] < longest
        else part
        for part in parts
    ]


def _difference(a: Condition, b: Condition) -> str:
    """The first difference of two layouts, in words."""
    if a.family != b.family or a.shape != b.shape:
        return f"{a.family} latents {a.shape} against {b.family} latents {b.shape}"
    if a.kwargs.keys() != b.kwargs.keys() or a.shared.keys() != b.shared.keys():
        odd = (a.kwargs.keys() ^ b.kwargs.keys()) | (a.shared.keys() ^ b.shared.keys())
        return f"its transformer call has other arguments ({', '.join(sorted(odd))})"
    odd = {key for key in a.fixed.keys() | b.fixed.keys() if a.fixed.get(key) != b.fixed.get(key)}
    if odd:
        key = min(odd)
        return f"{key} is {b.fixed.get(key)} against {a.fixed.get(key)}"
    pairs = [
        ("context", _layout(a.context), _layout(b.context)),
        *((key, a._part(key), b._part(key)) for key in a.kwargs),
        *((key, _layout(a.shared[key], True), _layout(b.shared[key], True)) for key in a.shared),
    ]
    key, x, y = next(pair for pair in pairs if pair[1] != pair[2])
    shown = ["none" if v is None else f"{v[0]} {v[1]}" for v in (x, y)]
    return f"{key} has other positions" if shown[0] == shown[1] else f"{key} is {shown[1]} against {shown[0]}"
