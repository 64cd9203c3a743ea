"""An activation recorder: names of layers go in, and what reaches each during a forward is handed on.

A forward may be ended as soon as the last of the layers was reached, since nothing after it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn


class _Enough(Exception):
    """Ends a forward."""


@contextmanager
def recorded(model: nn.Module, layers: Collection[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A context in which each forward of `model` calls ``see(layer, input)`` whenever one of its `layers` is run."""

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reached(model: nn.Module, layers: Collection[str], forward: Callable[[], Any]) -> list[str]:
    """The layers in the order in which a forward runs them, as often as it does."""
    found: list[str] = []
    with recorded(model, layers, lambda name, x: found.append(name)):
        forward()
    return found


def record(
    model: nn.Module, calls: Collection[str], see: Callable[[str, Tensor], None], forward: Callable[[], Any]
) -> None:
    """Run a forward until `calls`, layers by name as often as they are run, have all been seen."""
    left = len(calls)
    if not left:
        return

    def counted(name: str, x: Tensor) -> None:
        nonlocal left
        see(name, x)
        left -= 1
        if not left:
            raise _Enough

    with recorded(model, set(calls), counted), suppress(_Enough):
        forward()
