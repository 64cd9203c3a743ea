"""What a forward makes of words, places and time alone: found again at the next step of a walk, not computed anew.

A walk shows the transformer one condition at every step, so embedded words, refined captions and rotary tables stay
(`Family.steady`). Where modulation has no prompt in it, it depends on the noise level alone (`Family.timed`), and the
grid's levels come again in the next walk; that is kept as long as no adapter acts on those layers. Whether a condition
is the walk's own is seen from its memory: rows leave from the end, as views. All else is computed as before: with a
gradient, outside of walks, in rows under several adapters, inside compiled blocks. The modules are left as they were.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from danceopd.pipelines.condition import Condition
from danceopd.pipelines.family import Family

CONDITIONS = 2
"""Conditions of a walk that are remembered: a guided walk asks about two."""
LEVELS = 64
"""Noise levels whose modulation is remembered, one row of it each."""


@dataclass
class _Answer:
    """What a module said, and to arguments of which kind."""

    said: Any
    shape: torch.Size | None  # of the first tensor among the arguments
    plain: str  # the arguments where there is no tensor among them
    versions: list[int]


Answers = dict[str, list[_Answer]]  # module path -> its calls within a forward, in their order


@dataclass
class _Seen:
    """A condition that the walk asks about, and what was answered.

    Its tensors are held, so that no other can lie where they lie.
    """

    who: Hashable
    tensors: dict[str, Tensor]
    versions: list[int]
    fixed: dict[str, Any]
    steady: dict[str, nn.Module]
    timed: dict[str, nn.Module]  # none where an adapter acts on any
    key: Hashable  # of the timed answers, but for the level
    answers: Answers = field(default_factory=dict)


@dataclass
class Walk:
    """The walk that is under way. `level`: that of all rows, and where it is in memory; None: they are at several."""

    level: tuple[float, Tensor] | None = None
    seen: list[_Seen] = field(default_factory=list)

    def at(self, sigma: Tensor) -> float | None:
        """The noise level of a forward at `sigma (B,)`; None unless it is the step's own."""
        return self.level[0] if self.level and _begins(self.level[1], sigma, _versions(sigma)[0]) else None


_walk: ContextVar[Walk | None] = ContextVar("walk", default=None)


@contextmanager
def walk() -> Iterator[Walk]:
    """Inside, forwards of a `Backbone` without a gradient remember what stays; at the end it is forgotten.

    No weights may change inside.
    """
    found = Walk()
    token = _walk.set(found)
    try:
        yield found
    finally:
        _walk.reset(token)


@contextmanager
def anew() -> Iterator[None]:
    """Inside, everything is computed, also in a walk: for whoever records a forward."""
    token = _walk.set(None)
    try:
        yield
    finally:
        _walk.reset(token)


class Steady:
    """The steady and timed modules of one transformer, and the timed answers, which outlive a walk."""

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        self.transformer = transformer
        paths = [path for path, _ in transformer.named_modules()]
        self.steady, self.timed = (
            [path for path in paths if path and re.fullmatch(parts, path)] for parts in (family.steady, family.timed)
        )
        self._levels: OrderedDict[Hashable, Answers] = OrderedDict()

    @contextmanager
    def forward(
        self, x: Tensor, sigma: Tensor, condition: Condition, who: Hashable, adapted: Iterable[str]
    ) -> Iterator[None]:
        """Inside, one forward on inputs of `Backbone.velocity` by `who`, under an adapter of the modules `adapted`."""
        here = _walk.get()
        if here is None or torch.is_grad_enabled():
            yield
            return
        seen = self._seen(here, x, condition, who, adapted)
        stand_ins: dict[nn.Module, Callable[..., Any]] = {}
        for path, module in seen.steady.items():
            stand_ins[module] = _Steady(module.forward, seen.answers.setdefault(path, []))
        level = here.at(sigma)
        if level is not None and seen.timed:
            answers = self._levels.setdefault((level, seen.key), {})
            self._levels.move_to_end((level, seen.key))
            while len(self._levels) > LEVELS:
                self._levels.popitem(last=False)
            for path, module in seen.timed.items():
                stand_ins[module] = _Timed(module.forward, answers.setdefault(path, []), len(x))
        with _standing_in(stand_ins):
            yield

    def _seen(self, here: Walk, x: Tensor, condition: Condition, who: Hashable, adapted: Iterable[str]) -> _Seen:
        """What the walk knows of this condition; of a new one nothing yet."""
        who = id(self), who, x.shape[1:], x.dtype, x.device
        tensors = {"context": condition.context, **condition.kwargs, **condition.shared}
        now = {name: value for name, value in tensors.items() if value is not None}
        for seen in here.seen:
            if seen.who == who and seen.fixed == condition.fixed and seen.tensors.keys() == now.keys():
                pairs = zip(seen.tensors.values(), (now[name] for name in seen.tensors), seen.versions, strict=True)
                if all(_begins(kept, value, version) for kept, value, version in pairs):
                    here.seen.remove(seen)
                    here.seen.append(seen)
                    return seen
        compiled = [p for p, m in self.transformer.named_modules() if m._compiled_call_impl is not None]
        steady, timed = (
            {path: self.transformer.get_submodule(path) for path in paths if not _within(path, compiled)}
            for paths in (self.steady, self.timed)
        )
        if any(_within(path, self.timed) for path in adapted):
            timed = {}
        guidance = condition.kwargs.get("guidance")
        scales = None if guidance is None or not timed else tuple(guidance.flatten().tolist())
        if scales is not None and len(set(scales)) > 1:
            timed = {}
        weights = [p for module in timed.values() for p in module.parameters()]
        asked = sorted(now), sorted(condition.fixed), scales and scales[0], x.dtype, x.device
        key = repr(asked), torch.is_autocast_enabled(x.device.type), tuple(_versions(weights))
        seen = _Seen(who, now, _versions(list(now.values())), condition.fixed, steady, timed, key)
        here.seen = [*here.seen[1 - CONDITIONS :], seen]
        return seen


class _Steady:
    """A module's forward that answers as it did at the first step, for as many rows and tokens as there are now."""

    def __init__(self, stock: Callable[..., Any], answers: list[_Answer]) -> None:
        self.stock, self.answers, self.calls = stock, answers, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        given = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)), None)
        plain = repr((args, kwargs)) if given is None else ""
        if call < len(self.answers):
            answer = self.answers[call]
            if _versions(answer.said) != answer.versions:
                raise RuntimeError("a forward wrote into what one of its modules had answered, which the walk had kept")
            if answer.plain == plain and self.answers_it(answer, given):
                return self.again(answer, given)
        said = self.ask(given, args, kwargs)
        self.answers[call : call + 1] = [_Answer(said, None if given is None else given.shape, plain, _versions(said))]
        return self.again(self.answers[call], given)

    def ask(self, given: Tensor | None, args: Any, kwargs: Any) -> Any:
        """The module's own answer."""
        return self.stock(*args, **kwargs)

    def answers_it(self, answer: _Answer, given: Tensor | None) -> bool:
        """Whether the answer has all rows and tokens of the tensor given now."""
        if given is None or answer.shape is None:
            return given is answer.shape
        return given.ndim == len(answer.shape) and all(n <= m for n, m in zip(given.shape, answer.shape, strict=True))

    def again(self, answer: _Answer, given: Tensor | None) -> Any:
        """The answer's part for the tensor given now."""
        if given is None or given.shape == answer.shape:
            return answer.said
        first = tuple(slice(0, n) for n in given.shape[:-1])
        return tree_map_only(Tensor, lambda value: value[first], answer.said)


class _Timed(_Steady):
    """A module's forward whose rows are all alike: it is asked for one, so that an answer is the same after any walk.

    Qwen-Image-Edit 2511 asks for the rows at their time and then for as many at time 0: one of each.
    """

    def __init__(self, stock: Callable[..., Any], answers: list[_Answer], rows: int) -> None:
        super().__init__(stock, answers)
        self.rows = rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)), None)
        if given is None or given.ndim == 0 or len(given) % self.rows:
            return self.stock(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def ask(self, given: Tensor | None, args: Any, kwargs: Any) -> Any:
        rows = len(given)  # type: ignore[arg-type]
        args, kwargs = tree_map_only(Tensor, lambda v: v[:: self.rows] if len(v) == rows else v, (args, kwargs))
        return self.stock(*args, **kwargs)

    def answers_it(self, answer: _Answer, given: Tensor | None) -> bool:
        return given is not None and len(given) == len(answer.said) * self.rows

    def again(self, answer: _Answer, given: Tensor | None) -> Any:
        return answer.said.unsqueeze(1).expand(-1, self.rows, *answer.said.shape[1:]).flatten(0, 1)


@contextmanager
def _standing_in(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules' forwards are others. Hooks, and wrappers that stood there before, stay."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, stand_in in forwards.items():
            module.__dict__["forward"] = stand_in
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _begins(kept: Tensor, value: Tensor, version: int) -> bool:
    """Whether `value` is the first rows of `kept`, in the same memory, unwritten since."""
    return (
        value.data_ptr() == kept.data_ptr()
        and _versions(value) == [version]
        and value.dtype == kept.dtype
        and value.stride() == kept.stride()
        and value.shape[1:] == kept.shape[1:]
        and len(value) <= len(kept)
    )


def _versions(said: Any) -> list[int]:
    """How often each tensor was written; nothing counts it for tensors of inference mode."""
    tensors = (value for value in tree_leaves(said) if isinstance(value, Tensor))
    return [0 if value.is_inference() else value._version for value in tensors]


def _within(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)
