"""diffusers' `ModularPipeline`: a pipeline of blocks, in which guidance is a component and inputs belong to blocks.

It is recorded as any other pipeline, up to the first transformer call of its denoising block (`record.py`); what it has
instead of arguments is changed here, in the copy that is thrown away.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any


def is_modular(kind: type) -> bool:
    """Whether a pipeline class is made of blocks."""
    from diffusers import ModularPipeline

    return issubclass(kind, ModularPipeline)


def call_defaults(kind: type) -> dict[str, Any]:
    """The arguments that a stock pipeline class takes, and their defaults."""
    if is_modular(kind):
        return {one.name: one.default for one in kind().blocks.inputs}
    return {name: one.default for name, one in inspect.signature(kind.__call__).parameters.items()}


def prepare_modular(copied: Any, encoded: bool) -> None:
    """Switch guidance off in a copy of a modular pipeline; `encoded`: its call has prompt states in place of text."""
    guider = copy.copy(copied.guider)
    guider.disable()
    blocks = copied.blocks  # a copy
    if encoded:
        blocks.sub_blocks.pop("text_encoder")
    copied.__dict__.update(guider=guider, _blocks=blocks)
