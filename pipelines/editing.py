"""`EditingPipeline`: instructions and source images → conditions → denoising states → pictures, in batches.

Stock editing pipelines read a list of images as several references of ONE prompt, so they cannot batch
edits. Here the instructions are encoded in batches by the stock `encode_prompt`, each row is recorded with
its own source images, and the rows are stacked; the rest is `GenerationPipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from danceopd.errors import UserError

from .condition import Condition, stack
from .family import Family
from .generation import GenerationPipeline, check_prompts
from .record import record
from .registry import class_name, family_of

LONGEST = 8
"""Longer side of a source, at most, in lengths of the shorter one."""


class EditingPipeline(GenerationPipeline):
    """A stock editing pipeline taken apart as `GenerationPipeline` does; same `call`.

    Source images keep their shape wherever the stock pipeline lets them. One EditingPipeline serves one picture
    size: for aspect-ratio buckets make one for each `family.size_of(pipe, image, call)`; its conditions stack.
    """

    def __init__(self, pipe: Any, family: Family, call: dict[str, Any], chunk: int = 64) -> None:
        super().__init__(pipe, family, call, chunk)
        self.generation_pipe = generation_pipe(pipe, family)  # the same noise and schedule, without a source image

    @torch.no_grad()
    def conditions(  # type: ignore[override]
        self, prompts: list[str], images: Sequence[Image | Sequence[Image]]
    ) -> Condition:
        """Conditions of the edits `(prompts[i], images[i])`, one row each, in order.

        `images[i]` is the source, or several in their order where the stock pipeline takes several references.
        UserError when prompts and images differ in number, for an empty or truncated prompt, for a source that
        `check_image` refuses, for more sources than the family takes, and for sources of unequal sizes or number.
        """
        if len(prompts) != len(images):
            raise UserError(
                f"there are {len(prompts)} prompts and {len(images)} source images; give one image for each prompt"
            )
        check_prompts(self.pipe, self.family, prompts, self.call, editing=True)
        prompts = [self.family.prompt(prompt, True) for prompt in prompts]
        given: list[list[Any]] = [list(one) if isinstance(one, list | tuple) else [one] for one in images]
        for number, each in enumerate(given, start=1):
            name = f"source image {number} of {len(images)}"
            check_references(len(each), type(self.pipe).__name__, self.family, name)
            for image in each:
                check_image(image, self.family, name)
        if len(counts := {len(each) for each in given}) > 1:
            raise UserError(f"a batch has edits of {min(counts)} and of {max(counts)} sources; give all as many")
        rows = []
        for start in range(0, len(prompts), self.chunk):
            texts, sources = prompts[start : start + self.chunk], given[start : start + self.chunk]
            calls = self.family.encode_prompts(self.pipe, texts, sources, **self.call)
            rows += [self.recorded(each, call) for each, call in zip(sources, calls, strict=True)]
        return stack(rows)

    def recorded(self, sources: Sequence[Image], prompt: dict[str, Any]) -> Condition:
        """The condition of one edit, of what `encode_prompts` made of its prompt."""
        image = sources[0] if len(sources) == 1 else list(sources)
        found = record(self.pipe, self.family, **{**self.call, "image": image, **prompt})[0]
        several = {"references": len(sources)} if len(sources) > 1 else {}
        return replace(found, fixed={**found.fixed, **several})


def editing_pipe(pipe: Any, components: str | Path | None = None, family: Family | None = None) -> Any:
    """The family's stock editing pipeline over the same modules; a pipe that edits already is returned as it is.

    `components` is a pipeline's folder (or name on the hub): what the editing class needs and `pipe` lacks, such as
    an image processor, is read from there, and where the family has several editing classes, that pipeline's is used.
    UserError when the family cannot edit, or a component is missing.
    """
    family = family or family_of(pipe)
    if family.editing is None:
        raise UserError(f"{family.name} has no editing pipeline in diffusers; give it generation teachers only")
    name = editing_class(family, type(pipe).__name__, components)
    if type(pipe).__name__ == name:
        return family.prepare_editing(pipe)
    return family.prepare_editing(_rebuilt(pipe, name, components, family.optional))


def editing_class(family: Family, base: str, components: str | Path | None = None) -> str:
    """The stock class that edits: the base's class `base` where it does, else that of `components`, or the family's."""
    editing = tuple(name for name in (family.editing, *family.other_editing) if name)
    if base in editing or components is None:
        return base if base in editing else editing[0]
    given = class_name(components)
    if given not in family.classes:
        raise UserError(f"{components} is a {given}; give {family.name} the folder of a {' or '.join(editing)}")
    return given if given in editing else editing[0]


def generation_pipe(pipe: Any, family: Family | None = None) -> Any:
    """The family's stock generation pipeline over the same modules; also for a base saved as an editing pipeline."""
    family = family or family_of(pipe)
    generates = type(pipe).__name__ == family.generation or family.editing_generates(pipe)
    return pipe if generates else _rebuilt(pipe, family.generation)


def _rebuilt(pipe: Any, name: str, components: str | Path | None = None, optional: tuple[str, ...] = ()) -> Any:
    """The diffusers pipeline class `name` over the very modules of `pipe`; `optional` ones may be missing.

    Not `from_pipe`, which casts every shared module to one dtype: bf16 weights and fp32 adapters would change.
    """
    import diffusers

    kind = getattr(diffusers, name)
    needed, settings = kind._get_signature_keys(kind)
    parts = {key: value for key, value in pipe.components.items() if key in needed}
    required = {
        key
        for key, parameter in inspect.signature(kind.__init__).parameters.items()
        if key in needed and parameter.default is parameter.empty
    }
    missing = sorted(required - parts.keys())
    if missing and components is not None:
        parts.update(_components(components, missing, pipe.transformer))
        missing = sorted(required - parts.keys())
    parts.update({key: None for key in missing if key in optional})
    missing = [key for key in missing if key not in optional]
    if missing:
        raise UserError(
            f"{type(pipe).__name__} has no {', '.join(missing)}, which {name} needs to edit; set editing_base to "
            f"the folder or the hub name of a {name} that has it"
        )
    made = kind(**parts, **{key: pipe.config[key] for key in settings if key in pipe.config})
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def _components(place: str | Path, names: list[str], like: torch.nn.Module) -> dict[str, Any]:
    """The components `names` of the pipeline at `place`, as far as it has them; nothing else of it is loaded."""
    from diffusers import DiffusionPipeline

    weights = next(like.parameters())
    try:
        index = DiffusionPipeline.load_config(str(place))
        others = {k: None for k, v in index.items() if isinstance(v, list) and k not in names}
        held = DiffusionPipeline.from_pretrained(place, dtype=weights.dtype, **others).components
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{', '.join(names)} of {place} needs a package that is not installed ({reason}); install it"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{', '.join(names)} of {place} does not load ({reason}); fetch it again") from error
    found = {name: held[name] for name in names if held.get(name) is not None}
    return {k: v.to(weights.device).eval() if isinstance(v, torch.nn.Module) else v for k, v in found.items()}


def check_references(count: int, editing: str, family: Family, name: str) -> None:
    """UserError for an edit without a source, or with more than the stock class `editing` takes.

    `name` is how the message names the edit.
    """
    most = family.references(editing)
    if count == 0:
        raise UserError(f"{name} is an empty list; give the picture to edit")
    if count > most:
        takes = "one picture" if most == 1 else f"at most {most} pictures"
        raise UserError(f"{name} has {count} pictures, and {editing} takes {takes}; leave some out")


def check_image(image: Image, family: Family, name: str = "the source image") -> None:
    """UserError for a source that is no PIL image, has an alpha channel that the family does not read, is too small or
    too narrow.

    `name` is how the message names the image, such as its path.
    """
    if not isinstance(image, Image):
        raise UserError(f"{name} is a {type(image).__name__}, not a PIL image; open it with PIL.Image.open")
    alpha = {"A", "a"} & set(image.getbands()) or "transparency" in image.info
    if alpha and not family.alpha:
        raise UserError(f"{name} has an alpha channel; flatten it, for example with image.convert('RGB')")
    width, height = image.size
    if min(width, height) < family.smallest_source:
        raise UserError(
            f"{name} is {width}x{height} pixels; give one with at least {family.smallest_source} pixels a side"
        )
    check_aspect(width, height, name)


def check_aspect(width: int, height: int, name: str) -> None:
    """UserError for a source that is more than 8 times as long as wide; `name` is how the message names it."""
    if max(width, height) > LONGEST * min(width, height):
        raise UserError(f"{name} is {width}x{height} pixels; crop it to at most {LONGEST} times as long as wide")
