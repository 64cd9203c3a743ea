"""The layers' inputs of several adapters: for a blend's regression, stage after stage, in the order of the network.

A stage is as many layers as their Gram matrices have room for, or, where a layer's inputs are to be those of the merged
network (RegMean++), one block, before whose recording all blocks before it are blended. For each stage the states of
each adapter's own rollouts run through the network until the stage's last layer is reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danceopd.adapters.blend import LayerParts
from danceopd.adapters.blending.methods import Method
from danceopd.adapters.regression.moments import Moments, moments_bytes
from danceopd.adapters.regression.recorder import reached, record
from danceopd.adapters.svd import Factors
from danceopd.engine.calibration.states import Questions, State, batches, teacher_states
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField
from danceopd.models.lora import Adapter

ROOM = 4_000_000_000
"""Bytes that the moments of a stage may take; on a GPU half of what is free, if that is less."""
_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")
Report = Callable[[int, int, str], None]


class RecordedInputs:
    """`Inputs` of a blend of adapters of `backbone`, each with its own `questions`. A context: adapters that it adds
    to the backbone are taken out at its end. Draws are functions of `seed` and the row; `at_once` rows run together.
    """

    def __init__(
        self, backbone: Backbone, questions: Sequence[Questions], device: torch.device, seed: int = 0, at_once: int = 8,
        report: Report = lambda done, total, note: None, room: int | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.questions, self.device, self.seed = backbone, list(questions), device, seed
        self.at_once, self.report, self.room = at_once, report, room
        self.names: list[str | None] = []  # of each adapter on the backbone; None: the bare base
        self.added: list[str] = []  # all that is on the backbone for this
        self.solved_names: list[str] = []
        self.moments: dict[str, Moments] = {}
        self.done = self.total = 0

    def __enter__(self) -> RecordedInputs:
        return self

    def __exit__(self, *error: object) -> None:
        self.moments.clear()
        for name in self.added:
            self.backbone.remove_adapter(name)
        self.added.clear()

    def begin(self, adapters: Sequence[Adapter], parts: Mapping[str, LayerParts], how: Method) -> list[str]:
        """Roll the adapters out, and find the order of the layers."""
        self.adapters, self.parts, self.how = adapters, parts, how
        taking_part = {i for part in parts.values() for i in part.adapters}
        questions = [q if i in taking_part else replace(q, rows=()) for i, q in enumerate(self.questions)]
        for i, adapter in enumerate(adapters):  # of RegMean++ only what the merged network will have
            kept = {n: pair for n, pair in adapter.tensors.items() if n in parts or not how.sequential}
            self.names.append(self._add(f"_inputs-{i}", Adapter(kept)))
        fields = [q.field or AdapterField(self.backbone, name) for q, name in zip(questions, self.names, strict=True)]
        self.total = sum(len(q.dataset.sigmas(rows[0])) - 1 for q in questions for rows in batches(q, self.at_once))
        self.states = [
            teacher_states(field, q, self.seed, self.device, self.at_once, lambda: self._step("rollouts"))
            for field, q in zip(fields, questions)
        ]
        self.calls = [self._calls(i) for i in range(len(adapters))]
        order = list(dict.fromkeys(name for calls in self.calls for name in calls))
        if not order:
            raise RuntimeError("no layer of the blend is reached by any forward")
        order += [name for name in parts if name not in set(order)]  # no input reaches them
        self.stages = stages(order, {name: self._bytes(name) for name in order}, how.sequential, self._room())
        self.done, self.total = 0, len(self.stages) * sum(map(len, self.states))
        return [name for stage in self.stages for name in stage]

    def of(self, layer: str) -> Moments:
        if layer not in self.moments:
            self._record(next(stage for stage in self.stages if layer in stage))
        return self.moments.pop(layer)

    def solved(self, layer: str, pair: Factors) -> None:
        if self.how.sequential:
            name = self._add(f"_merged-{len(self.solved_names)}", Adapter({layer: pair}))
            assert name is not None
            self.solved_names.append(name)

    # Inside

    def _record(self, stage: Collection[str]) -> None:
        """The moments of a stage's layers: in each adapter's network, with the solved layers in their places."""
        solved = list(self.solved_names)
        for name in stage:
            active = self.parts[name].adapters
            pairs = [self.adapters[i].tensors.get(name) for i in active]
            held = [None if p is None else (p[0].to(self.device), p[1].to(self.device)) for p in pairs]
            self.moments[name] = Moments(held, self.how.latent)
        for i, states in enumerate(self.states):
            calls = [name for name in self.calls[i] if name in stage and i in self.parts[name].adapters]
            rows = sum(len(state.x) for state in states)
            for state in states:
                see = partial(self._see, i, {name: len(state.x) / rows / calls.count(name) for name in calls})
                with self._acting(i), self.backbone.overlaid(solved):
                    record(self.backbone.transformer, calls, see, partial(self._forward, state))
                self._step("inputs")

    def _see(self, i: int, shares: Mapping[str, float], layer: str, x: Tensor) -> None:
        self.moments[layer].add(self.parts[layer].adapters.index(i), x, shares[layer])

    def _calls(self, i: int) -> list[str]:
        """The blend's layers as an adapter's forward runs them."""
        if not self.states[i]:
            return []
        with self._acting(i):
            return reached(self.backbone.transformer, list(self.parts), lambda: self._forward(self.states[i][0]))

    def _acting(self, i: int) -> AbstractContextManager[None]:
        return self.backbone.acting_as(self.names[i])

    @torch.no_grad()
    def _forward(self, state: State) -> Any:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks know no recorder
            return self.backbone.velocity(state.x, state.sigma, state.condition)

    def _add(self, name: str, adapter: Adapter) -> str | None:
        if not adapter.tensors:
            return None
        self.backbone.add_adapter(name, adapter)
        self.added.append(name)
        return name

    def _step(self, note: str) -> None:
        self.done += 1
        self.report(self.done, self.total, note)

    def _bytes(self, name: str) -> int:
        pairs = [self.adapters[i].tensors[name] for i in self.parts[name].adapters if name in self.adapters[i].tensors]
        return moments_bytes(sum(len(a) for a, _ in pairs), pairs[0][0].shape[1], self.how.latent)

    def _room(self) -> int:
        if self.room is not None:
            return self.room
        return min(ROOM, torch.cuda.mem_get_info(self.device)[0] // 2) if self.device.type == "cuda" else ROOM


def stages(order: Sequence[str], sizes: Mapping[str, int], sequential: bool, room: int) -> list[list[str]]:
    """The layers in groups that are recorded together: blocks one after another, or as many layers as have room."""
    found: list[list[str]] = []
    if sequential:
        blocks: dict[str, list[str]] = {}
        for name in order:
            blocks.setdefault(block_of(name), []).append(name)
        return list(blocks.values())
    left = 0
    for name in order:
        if not found or sizes[name] > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= sizes[name]
    return found


def block_of(layer: str) -> str:
    """The block that a layer stands in: its name up to the first number, or all of it."""
    found = _BLOCK.match(layer)
    return layer if found is None else found[0]
