"""`Family`: the facts and functions that one model family needs, as one frozen dataclass; what a new family fills in.

A family names its diffusers pipeline classes and LoRA target modules, says how guidance is switched off and on, turns
a recorded transformer call into a `Condition`, calls the transformer for a velocity, and decodes latents. No other code
in the package asks which family it works on, and tests compare every family with its stock pipeline.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from danceopd.errors import UserError

from .modular import call_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

    from .condition import Condition


def classifier_free(v: Tensor, v_null: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Classifier-free guidance `v_null + scale (v - v_null)` (arXiv 2207.12598); shapes and dtype of `v`."""
    return v_null + scale * (v - v_null)


# Defaults of Family's fields


def unchanged_pipe(pipe: Any) -> Any:
    """Default of `prepare_editing`: the stock editing pipeline works as it is."""
    return pipe


def never(pipe: Any) -> bool:
    """Default of `editing_generates`: pictures without a source image come from the generation class."""
    return False


def stock_limit(pipe: Any, call: dict[str, Any]) -> int:
    """Default of `prompt_limit`: `max_sequence_length` of the call, else the stock pipeline's default.

    A stock pipeline that has no such setting cuts nothing.
    """
    stock = call_defaults(type(pipe))
    return call.get("max_sequence_length") or stock.get("max_sequence_length", sys.maxsize)


def no_extra(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Default of `extra`: the stock call needs nothing besides the recipe's settings."""
    return {}


def source_size(pipe: Any, image: Image, call: dict[str, Any]) -> tuple[int, int]:
    """Default of `size_of`: the source's (height, width), scaled down to the call's area, floored to whole tokens."""
    width, height = image.size
    area = call.get("height", 1024) * call.get("width", 1024)
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
    side = 2 * pipe.vae_scale_factor
    return max(side, height // side * side), max(side, width // side * side)


def one_source(editing: str) -> int:
    """Default of `references`: an edit has one source picture."""
    return 1


def latent_pairs(pipe: Any) -> int:
    """Default of `token_side`: a token is two by two latents."""
    return 2 * pipe.vae_scale_factor


def prompts_as_text(
    pipe: Any, prompts: list[str], images: Sequence[Sequence[Image]] | None, **call: Any
) -> list[dict[str, Any]]:
    """Default of `encode_prompts`: the pipeline encodes each prompt itself when its row is recorded."""
    return [{"prompt": prompt} for prompt in prompts]


def unchanged_prompt(prompt: str, editing: bool) -> str:
    """Default of `prompt`: the stock classes take any text."""
    return prompt


def same_prompt(other: Condition, condition: Condition) -> Condition:
    """Default of `fit_prompt`: prompts do not depend on the number of sources."""
    return other


def nothing_to_change(pipe: Any) -> None:
    """Default of `prepare_recording`: the stock call can be told all by its arguments."""


def whole_tokens(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Default of `drawn`: the stock pipeline floors a size to pairs of latents; UserError where nothing is left."""
    side = 2 * pipe.vae_scale_factor
    if min(height, width) < side:
        raise UserError(
            f"height {height} and width {width} leave no picture, since sizes are rounded down to multiples of {side}; "
            f"give at least {side}"
        )
    return height // side * side, width // side * side


def in_multiples(side: Callable[[Any], int]) -> Callable[[Any, int, int], tuple[int, int]]:
    """A `drawn` of stock pipelines that refuse a size which is no multiple of `side(pipe)` pixels."""

    def drawn(pipe: Any, height: int, width: int) -> tuple[int, int]:
        if height % (each := side(pipe)) or width % each:
            raise UserError(
                f"height {height} and width {width} must be multiples of {each} for {type(pipe).__name__}; change them"
            )
        return height, width

    return drawn


def one_frame(pipe: Any, call: dict[str, Any]) -> int:
    """Default of `frames`: what is drawn is a picture."""
    return 1


def side_by_side(frames: Sequence[Image]) -> Image:
    """The frames of a video as one picture; one frame is that picture."""
    from PIL import Image

    width, height = frames[0].size
    whole = Image.new(frames[0].mode, (width * len(frames), height))
    for number, frame in enumerate(frames):
        whole.paste(frame, (number * width, 0))
    return whole


def image_processor(pipe: Any) -> Any:
    """What makes pixels of pictures: a stock pipeline's `image_processor`, or that of its videos."""
    return getattr(pipe, "image_processor", None) or pipe.video_processor


def unchanged_condition(condition: Condition) -> Condition:
    """Default of `sync_free`: the forward reads nothing of the condition back from the device."""
    return condition


def image_grid(condition: Condition) -> tuple[int, int] | None:
    """Default of `grid`: (rows, columns) of latents (C, h, w); None for tokens, whose places are not known."""
    return (condition.shape[1], condition.shape[2]) if len(condition.shape) == 3 else None


def grid_from_ids(ids: Tensor, n: int) -> tuple[int, int] | None:
    """(rows, columns) of a picture of `n` tokens from their position ids (tokens, …).

    The picture's ids begin with 0, then row and column. None unless the tokens fill that grid.
    """
    rows, columns = (int(v) + 1 for v in ids[ids[:, 0] == 0][:, 1:3].amax(0))
    return (rows, columns) if rows * columns == n else None


@dataclass(frozen=True)
class Family:
    """What danceopd must know about one model family. `pipe` is always a stock diffusers pipeline.

    `call` in a signature holds what `GenerationPipeline` was given: height, width, num_inference_steps, and the
    settings that the field `call` names.
    """

    name: str
    generation: str  # diffusers class that makes a picture from a prompt
    editing: str | None  # diffusers class that edits a source image; None: there is none
    lora_targets: str  # PEFT full-match regex over module paths
    guidance_off: dict[str, Any]  # call kwargs that switch classifier-free guidance off
    text_components: tuple[str, ...]  # what a pipeline no longer needs once its prompts are encoded
    # (pipe, rows, **call) -> call kwargs with prompt embeddings of zeros, so that no text encoder is needed
    dummy_prompt: Callable[..., dict[str, Any]]
    split: Callable[[dict[str, Any]], tuple[Tensor, Condition]]  # a recorded call -> noisy latents, the rest
    velocity: Callable[[Any, Tensor, Tensor, Condition], Tensor]  # (transformer, x, sigma (B,), condition) -> v fp32
    decode: Callable[[Any, Tensor, int, int], list[Image]]  # (pipe, x, height, width) -> pictures
    # (pipe, pixels (B, 3, height, width) in [-1, 1]) -> x0, the inverse of `decode`; four channels where `alpha` is set
    encode_images: Callable[[Any, Tensor], Tensor]
    prompt_kwargs: tuple[str, ...]  # the Condition's kwargs that hold the prompt (guidance replaces these)
    prompt_lengths: Callable[[Any, list[str]], list[int]]  # (pipe, prompts) -> tokens each, untruncated
    prompt_limit: Callable[[Any, dict[str, Any]], int] = stock_limit  # (pipe, call) -> tokens before a prompt is cut
    # (a null prompt's condition, the one that gets its prompt) -> the former for as many sources as the latter has
    fit_prompt: Callable[[Condition, Condition], Condition] = same_prompt
    # (prompt, whether it is an edit's) -> the text that the stock class takes; UserError for one that it refuses
    prompt: Callable[[str, bool], str] = unchanged_prompt
    # (pipe, prompts, sources, **call) -> the call kwargs of each row; `sources` are the pictures of each row, as many
    # in every row, or None without any
    encode_prompts: Callable[..., list[dict[str, Any]]] = prompts_as_text
    guidance_on: Callable[[float], dict[str, Any]] | None = None  # scale -> call kwargs; None: it has no such guidance
    # (v, v_null, scale, condition of v, None: one without a source) -> the guided velocity
    guide: Callable[..., Tensor] = classifier_free
    other_editing: tuple[str, ...] = ()  # further editing classes on the same transformer
    optional: tuple[str, ...] = ()  # components that the editing class takes and `prepare_editing` can do without
    # (editing pipe) -> one that can edit; the pipe given is left as it is
    prepare_editing: Callable[[Any], Any] = unchanged_pipe
    # (editing pipe) -> whether pictures without a source come from the editing class, too
    editing_generates: Callable[[Any], bool] = never
    extra: Callable[[Any, dict[str, Any]], dict[str, Any]] = no_extra  # (pipe, call) -> more kwargs of the stock call
    # (a copy of the pipe, thrown away after its first transformer call) -> None: changes in it what the stock call
    # cannot be told by its arguments
    prepare_recording: Callable[[Any], None] = nothing_to_change
    # (pipe, source image, call) -> (height, width) of the edited picture
    size_of: Callable[[Any, Image, dict[str, Any]], tuple[int, int]] = source_size
    references: Callable[[str], int] = one_source  # (editing class) -> source pictures that one edit may have
    shaped_by: int = 0  # which of several sources gives an edit its shape: 0 the first, -1 the last
    alpha: bool = False  # pictures are RGBA: the alpha channel of a source is read, and the decoder draws one
    smallest_source: int = 64  # pixels a side
    source_text: int = 0  # text tokens that the encoder makes of a source image, at most
    # (pipe, height, width) -> the (height, width) that the generation class draws when it is called with that size;
    # UserError for one that it refuses
    drawn: Callable[[Any, int, int], tuple[int, int]] = whole_tokens
    token_side: Callable[[Any], int] = latent_pairs  # (pipe) -> pixels a side of a picture's token
    grid: Callable[[Condition], tuple[int, int] | None] = image_grid  # rows and columns of a picture's latents
    # (transformer, condition) -> the same with its source's keys and values, computed once, in place of the source;
    # None: source tokens attend to the noisy ones or depend on the time, or there are none. It holds what the stock
    # pipeline keeps in a cache between steps
    cache_source: Callable[[Any, Condition], Condition] | None = None
    # condition -> the same with all in `fixed` that `velocity` would read back from the device (a host sync), so that a
    # CUDA graph can hold the forward; text may be padded to a round length where that changes nothing. The result is
    # not to be cut into rows. None: the forward itself waits for the device, so no graph can hold it.
    sync_free: Callable[[Condition], Condition] | None = unchanged_condition
    call: tuple[str, ...] = ("max_sequence_length",)  # settings of the stock call a recipe may give besides the size
    usual: Mapping[str, Any] = field(default_factory=dict)  # arguments whose default here is not the stock class's
    video: bool = False  # the stock class draws videos, as lists of frames; a picture is one frame
    # (pipe, call) -> frames of latents that are drawn; UserError for a number of frames that the class cannot draw
    frames: Callable[[Any, dict[str, Any]], int] = one_frame

    @property
    def classes(self) -> tuple[str, ...]:
        """Every stock pipeline class of the family, the generation class first."""
        return tuple(dict.fromkeys(c for c in (self.generation, self.editing, *self.other_editing) if c))

    @property
    def loads_loras(self) -> bool:
        """Whether the stock pipeline has `load_lora_weights`; its transformer has `load_lora_adapter` in any case."""
        import diffusers

        return hasattr(getattr(diffusers, self.generation), "load_lora_weights")

    def pictures(self, output: Any) -> list[Image]:
        """The pictures in what the stock pipeline returns; of a video its frames side by side."""
        return [side_by_side(frames) for frames in output.frames] if self.video else output.images

    def edited_size(self, pipe: Any, shapes: Sequence[tuple[int, int]], call: dict[str, Any]) -> tuple[int, int]:
        """(height, width) of an edit of sources of (width, height) `shapes`, as `size_of` says of the one that counts.
        """
        from PIL import Image

        return self.size_of(pipe, Image.new("1", shapes[self.shaped_by]), call)

    def arguments(self, pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
        """`call` as the stock class takes it: with `extra`, without a size where it has that of the source image."""
        taken, given = call_defaults(type(pipe)), {**self.usual, **self.extra(pipe, call), **call}
        return {key: value for key, value in given.items() if key in taken or key not in ("height", "width")}

    def stock_call(self) -> dict[str, Any]:
        """Size, steps and settings that the generation class uses when it is called with a prompt alone."""
        import diffusers

        defaults = {**call_defaults(getattr(diffusers, self.generation)), **self.usual}
        settings = {key: defaults[key] for key in ("num_inference_steps", *self.call) if defaults.get(key) is not None}
        return {"height": 1024, "width": 1024, **settings}
