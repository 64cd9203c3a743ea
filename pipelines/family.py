"""What the toolkit must know about one model family: one frozen dataclass, under 40 lines a family.

A family says which pipeline classes it has, which modules a LoRA adapts, how guidance is switched off and on, how
a recorded transformer call becomes a `Condition`, how a velocity is read out of the transformer, and how latents
become pictures and pictures latents. Everything else in the package is family-free; the stock pipeline is every
family's oracle.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from .record import Condition


def classifier_free(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """`v_null + scale (v - v_null)` (arXiv 2207.12598); shapes and dtype of `v`. Scale 1 is `v`."""
    return v_null + scale * (v - v_null)


def itself(pipe: Any) -> Any:
    """The stock editing class can edit as it is made."""
    return pipe


def never(pipe: Any) -> bool:
    """The family's editing classes draw nothing that its generation class does not draw."""
    return False


def stock_limit(pipe: Any, call: dict[str, Any]) -> int:
    """`max_sequence_length`: the call's, else the stock pipeline's own."""
    stock = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return call.get("max_sequence_length") or stock


def no_extra(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The stock call needs nothing besides the recipe's settings."""
    return {}


def own_shape(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """The source's own (height, width), brought down to the area of the call's, floored to whole tokens."""
    width, height = image.size
    area = call.get("height", 1024) * call.get("width", 1024)
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
    side = 2 * pipe.vae_scale_factor
    return max(side, height // side * side), max(side, width // side * side)


def one_by_one(pipe: Any, prompts: list[str], images: Sequence[Image] | None, **call: Any) -> list[dict[str, Any]]:
    """The pipeline encodes each prompt itself, when its row is recorded."""
    return [{"prompt": prompt} for prompt in prompts]


def as_it_is(condition: Condition) -> Condition:
    """The velocity asks the device nothing about the condition."""
    return condition


def own_grid(condition: Condition) -> tuple[int, int] | None:
    """(rows, columns) of latents that are a picture (C, h, w); None for tokens whose places are not known."""
    return (condition.shape[1], condition.shape[2]) if len(condition.shape) == 3 else None


def numbered_grid(ids: Tensor, n: int) -> tuple[int, int] | None:
    """(rows, columns) of a picture's `n` tokens by positions `ids` (tokens, …): their first number is 0, the next two
    are row and column; None unless the tokens fill that grid."""
    rows, columns = (int(v) + 1 for v in ids[ids[:, 0] == 0][:, 1:3].amax(0))
    return (rows, columns) if rows * columns == n else None


@dataclass(frozen=True)
class Family:
    """What danceopd must know about one model family. `pipe` is always the stock diffusers pipeline.

    `call` in a signature is what `GenerationPipeline` was given: height, width, num_inference_steps, and any of
    the settings that the field `call` names.
    """

    name: str
    generation: str  # diffusers class that draws from a prompt
    editing: str | None  # diffusers class that edits a source image; None: there is none
    lora_targets: str  # PEFT full-match regex over module paths
    unguided: dict[str, Any]  # call kwargs that switch classifier-free guidance off
    text_components: tuple[str, ...]  # what a pipeline no longer needs once its prompts are encoded
    blank: Callable[..., dict[str, Any]]  # (pipe, rows, **call) -> call kwargs, no text encoder needed
    split: Callable[[dict[str, Any]], tuple[Tensor, Condition]]  # a recorded call -> noisy latents, the rest
    velocity: Callable[[Any, Tensor, Tensor, Condition], Tensor]  # (transformer, x, sigma (B,), condition) -> v fp32
    decode: Callable[[Any, Tensor, int, int], list[Image]]  # (pipe, x, height, width) -> pictures
    clean: Callable[[Any, Tensor], Tensor]  # (pipe, pixels (B, 3, height, width) in [-1, 1]) -> x0, decode's inverse
    prompt_kwargs: tuple[str, ...]  # what of a Condition holds the prompt (guidance replaces these)
    prompt_lengths: Callable[[Any, list[str]], list[int]]  # (pipe, prompts) -> tokens each, untruncated
    prompt_limit: Callable[[Any, dict[str, Any]], int] = stock_limit  # (pipe, call) -> tokens before a prompt is cut
    encode: Callable[..., list[dict[str, Any]]] = one_by_one  # (pipe, prompts, images, **call) -> a row's call kwargs
    guided: Callable[[float], dict[str, Any]] | None = None  # scale -> call kwargs of stock guidance; None: it has none
    guide: Callable[[Tensor, Tensor, float], Tensor] = classifier_free  # (v, v_null, scale) -> the guided velocity
    other_editing: tuple[str, ...] = ()  # further editing classes on the same transformer
    optional: tuple[str, ...] = ()  # components that the editing class asks for and `ready` can do without
    ready: Callable[[Any], Any] = itself  # (editing pipe) -> one that can edit; the pipe given is left as it is
    draws: Callable[[Any], bool] = never  # (editing pipe) -> its model draws through the editing class, too
    extra: Callable[[Any, dict[str, Any]], dict[str, Any]] = no_extra  # (pipe, call) -> more kwargs of the stock call
    size_of: Callable[[Any, Image, dict[str, Any]], tuple[int, int]] = own_shape  # see own_shape
    smallest_source: int = 64  # pixels a side
    grid: Callable[[Condition], tuple[int, int] | None] = own_grid  # rows and columns of a picture's latents
    # (transformer, condition) -> the same with its source's keys and values, computed once, in place of the source;
    # None: source tokens see the noisy ones, or the time, or there are none
    keep_source: Callable[[Any, Condition], Condition] | None = None
    # condition -> the same with all in `fixed` that `velocity` would read back from the device, so that a CUDA graph
    # can hold the forward; text may be padded to a round length, where that changes nothing. Not to be cut into rows
    still: Callable[[Condition], Condition] = as_it_is
    # Paths (full-match regex) of modules whose answers stay over a walk, since they see words, places or sources and
    # neither the picture nor the time; and of those that see the time alone (a `guidance` number besides it)
    steady: str = ""
    timed: str = ""
    call: tuple[str, ...] = ("max_sequence_length",)  # settings of the stock call a recipe may give besides the size

    @property
    def classes(self) -> tuple[str, ...]:
        """Every stock pipeline class of the family, the generation one first."""
        return tuple(dict.fromkeys(c for c in (self.generation, self.editing, *self.other_editing) if c))

    def stock_call(self) -> dict[str, Any]:
        """Size, steps and settings of a picture when the generation class is called with a prompt alone."""
        import diffusers

        said = inspect.signature(getattr(diffusers, self.generation).__call__).parameters
        settings = {key: said[key].default for key in ("num_inference_steps", *self.call) if key in said}
        return {"height": 1024, "width": 1024, **settings}
