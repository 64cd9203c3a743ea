"""Pipelines of two transformers, of which the noise level chooses (Wan 2.2 A14B): one module that holds both.

`joined` hangs the second on the first as its child `transformer_2`. So all that works on a transformer finds the layers
of both, those of the second under names that begin with `transformer_2.`, and the family's `velocity` asks the one of
each row's noise level. Stock loaders look into children, too, so a pipeline is `parted` before one is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from danceopd.errors import UserError

SECOND = "transformer_2"
"""The component of a pipeline, and the child of its transformer."""
PREFIX = f"{SECOND}."


def boundary(index: Mapping[str, Any], where: object) -> float | None:
    """The share of the noise below which the second transformer is run, of a pipeline's settings (its index or config).

    None for a pipeline of one. UserError for a number that is no share.
    """
    listed, ratio = index.get(SECOND), index.get("boundary_ratio")
    if not isinstance(listed, list | tuple) or listed[-1] is None or ratio is None:  # the stock class runs one, too
        return None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(
            f"{where} has two transformers and boundary_ratio {str(ratio)[:40]} in its model_index.json; it must be a "
            "number between 0 and 1, fetch the model again"
        )
    return float(ratio)


def joined(transformer: nn.Module, second: nn.Module, ratio: float) -> nn.Module:
    """`transformer` with the second as its child, and the boundary between the two."""
    transformer.add_module(SECOND, second)
    transformer.boundary = ratio  # type: ignore[assignment]
    return transformer


def joined_pipe(pipe: Any) -> Any:
    """A loaded pipeline, whose transformer holds the second where it has two; the pipeline stays as it is else."""
    second, ratio = getattr(pipe, SECOND, None), boundary(pipe.config, pipe.config.get("_name_or_path"))
    if ratio is not None and second is not None and pipe.transformer is not None:
        joined(pipe.transformer, second, ratio)
    return pipe


def parted(pipe: Any) -> nn.Module | None:
    """Take the second transformer out of the first of a pipeline, which is a stock one again; returns it, or None."""
    return pipe.transformer._modules.pop(SECOND, None)


def of_second(names: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to layers of the second transformer, by their names in it."""
    return {name.removeprefix(PREFIX): value for name, value in names.items() if name.startswith(PREFIX)}
