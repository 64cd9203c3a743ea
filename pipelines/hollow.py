"""A model's class and configuration without its weights: what a stock pipeline needs to be called up to its model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


def hollow(module: nn.Module, like: Tensor) -> Any:
    """A copy of `module` with no children, buffers or hooks before its forward, and one empty parameter as `like`.

    The module given is left as it is. Pipelines read a model's dtype and device from its parameters.
    """
    empty = copy.copy(module)
    empty._modules, empty._buffers, empty._forward_pre_hooks = {}, {}, OrderedDict()
    empty._forward_pre_hooks_with_kwargs = OrderedDict()
    empty._parameters = {"like": nn.Parameter(like.new_empty(0), requires_grad=False)}
    return empty
