"""What the toolkit must know about one model family: one frozen dataclass, under 40 lines a family.

A family says which pipeline classes it has, which modules a LoRA adapts, how guidance is switched off and on, how
a recorded transformer call becomes a `Condition`, how a velocity is read out of the transformer, and how latents
become pictures. Everything else in the package is family-free; the stock pipeline is every family's oracle.
"""

from __future__ import annotations

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


def one_by_one(pipe: Any, prompts: list[str], images: Sequence[Image] | None, **call: Any) -> list[dict[str, Any]]:
    """The pipeline encodes each prompt itself, when its row is recorded."""
    return [{"prompt": prompt} for prompt in prompts]


@dataclass(frozen=True)
class Family:
    """What danceopd must know about one model family. `pipe` is always the stock diffusers pipeline."""

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
    prompt_kwargs: tuple[str, ...]  # what of a Condition holds the prompt (guidance replaces these)
    prompt_lengths: Callable[[Any, list[str]], list[int]]  # (pipe, prompts) -> tokens each, untruncated
    encode: Callable[..., list[dict[str, Any]]] = one_by_one  # (pipe, prompts, images, **call) -> a row's call kwargs
    guided: Callable[[float], dict[str, Any]] | None = None  # scale -> call kwargs of stock guidance; None: it has none
    guide: Callable[[Tensor, Tensor, float], Tensor] = classifier_free  # (v, v_null, scale) -> the guided velocity
    smallest_source: int = 64  # pixels a side
    call: tuple[str, ...] = ("max_sequence_length",)  # settings of the stock call a recipe may give besides the size
