"""`record`: run a stock diffusers pipeline up to its first transformer call and return that call as a `Condition`.

A forward pre-hook catches the call's arguments and ends the run with a private exception. It runs on a shallow copy, so
the user's pipeline is never changed. With the condition, the velocity of any adapter on the same transformer can be
computed at any state; conditions of equal layout stack into a batch, also where the pipeline itself refuses batches.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from danceopd.common.messages import clipped
from danceopd.errors import UserError

from .condition import Condition
from .modular import is_modular, prepare_modular

if TYPE_CHECKING:
    from .family import Family


class _Recorded(BaseException):
    """Ends a pipeline's run at its first transformer call; modular pipelines log every `Exception`."""


def first_call(
    pipe: Any, family: Family, dtype: torch.dtype | None = None, **call: Any
) -> tuple[dict[str, Any], Tensor]:
    """The kwargs of the stock pipeline's first transformer call, and its sigmas `(N+1,)` fp32, last 0.

    `call` are the pipeline's own arguments; guidance is switched off. Without a `generator` the noise comes
    from a private one, so the global random state is left alone. Pipelines may round what they hand to the
    transformer to its dtype; `dtype` stands for that dtype when it is given.
    """
    caught: dict[str, Any] = {}

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
        caught.update(zip(names, args, strict=False), **kwargs)
        raise _Recorded

    call.setdefault("generator", torch.Generator().manual_seed(0))
    encoded = call.get("prompt") is None
    copied = _disposable_copy(pipe, family.text_components if encoded else (), dtype)
    if is_modular(type(pipe)):
        prepare_modular(copied, encoded)
    family.prepare_recording(copied)
    hook = copied.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    lists = {key: list(value) for key, value in call.items() if isinstance(value, list)}  # pipelines write into them
    try:
        copied(**{**family.arguments(pipe, call), **lists, **family.guidance_off})
    except _Recorded:
        return caught, copied.scheduler.sigmas.detach().to("cpu", torch.float32, copy=True)
    except UserError:
        raise
    except ValueError as error:
        said = clipped(str(error), 200)
        raise UserError(f"{type(pipe).__name__} refuses this call ({said}); change call in the recipe") from error
    finally:
        hook.remove()
        getattr(pipe, "maybe_free_model_hooks", list)()
    raise RuntimeError(f"{type(pipe).__name__} returned without calling its transformer")


def _disposable_copy(pipe: Any, without: Sequence[str], dtype: torch.dtype | None) -> Any:
    """A shallow copy with its own scheduler and settings, and a transformer without blocks; `without` are None in it.

    The same classes and configurations, and the same other components. So an interrupted run leaves no trace
    on the user's pipeline, and the dozen loops over all modules that a stock call makes cost next to nothing.
    """
    copied, transformer = copy.copy(pipe), getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    like = next(transformer.parameters())
    empty = empty_module(transformer, like if dtype is None else like.new_empty(0, dtype=dtype))
    changed = {"transformer": empty, "scheduler": copy.copy(pipe.scheduler), **dict.fromkeys(without)}
    copied.__dict__.update(changed, _progress_bar_config={"disable": True})
    return copied


def record(pipe: Any, family: Family, **call: Any) -> tuple[Condition, Tensor]:
    """Run the stock `pipe(**call)` up to its first transformer call.

    Returns the condition (as many rows as the pipeline's batch) and the scheduler's sigmas for that call,
    `(N+1,)` fp32 on the CPU, last 0. UserError for a call that the stock class refuses. TypeError when the family's
    `split` left an argument in `kwargs` that is no tensor.
    """
    kwargs, sigmas = first_call(pipe, family, **call)
    condition = family.split(kwargs)[1]
    wrong = [key for key, value in condition.kwargs.items() if not isinstance(value, Tensor | None)]
    if wrong:
        raise TypeError(f"{family.name}: cannot record the transformer argument(s) {', '.join(wrong)}")
    return replace(condition, family=family.name), sigmas


def empty_module(module: nn.Module, like: Tensor) -> Any:
    """A copy of `module` without layers, buffers or forward pre-hooks, and with one empty parameter like `like`.

    Stands in for a model that is not to run: pipelines read its config, dtype and device from its parameters, and how
    many blocks it has (they make a cache for each). The module given is left as it is.
    """
    empty, block = copy.copy(module), nn.Identity()
    lists = {name: part for name, part in module._modules.items() if isinstance(part, nn.ModuleList)}
    empty._modules = {name: nn.ModuleList([block] * len(part)) for name, part in lists.items()}
    empty._buffers, empty._forward_pre_hooks = {}, OrderedDict()
    empty._forward_pre_hooks_with_kwargs = OrderedDict()
    empty._parameters = {"like": nn.Parameter(like.new_empty(0), requires_grad=False)}
    return empty
