"""`sample`: a student and a prompt (and source images) go in, PNG files from the stock diffusers pipeline come out.

Added to the stock call are only the base's settings (`danceopd.json` beside its `model_index.json`: size, steps,
guidance), those of the student's recipe, one CPU generator for each image (`seed + i`), and a new file name. An edit
has the size that it has in a merge: the source's shape, in about the area of the settings' height and width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danceopd.common.files import disk_errors
from danceopd.data.images import open_image
from danceopd.errors import UserError
from danceopd.models.base import call_defaults
from danceopd.recipe.recorded import recorded_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger("danceopd")


def generate(
    pipe: Any,
    prompt: str,
    image: Image | Sequence[Image] | None,
    seed: int,
    count: int,
    editing_base: str | None,
    settings: dict[str, Any],
    size: tuple[int, int] | None,
    family: str | None = None,
) -> Iterator[Image]:
    """`count` images of a prompt, or edits of `image` (or of several in their order), one after the other, so that each
    is saved before the next.

    `editing_base` has what the base's editing pipeline may lack; `settings` override the base's own, `size` (height,
    width) theirs. `family` None: that of the pipeline's class.
    """
    import torch

    from danceopd.pipelines.editing import editing_pipe, generation_pipe
    from danceopd.pipelines.registry import family_of

    call = call_defaults(pipe.config.get("_name_or_path") or "") | settings
    known = family_of(pipe, family)
    if image is None:
        pipe = generation_pipe(pipe, known)
        if size is not None:
            known.drawn(pipe, *size)  # UserError for one that the class refuses
    else:
        pipe = editing_pipe(pipe, editing_base, known)
        sources: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        size = size or known.edited_size(pipe, [one.size for one in sources], call)
        call["image"] = sources if len(sources) > 1 else sources[0]
    if size is not None:
        call["height"], call["width"] = size
    prompt = known.prompt(prompt, image is not None)
    _warn_if_truncated(pipe, known, prompt, call)
    for i in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        yield known.pictures(pipe(prompt=prompt, generator=generator, **known.arguments(pipe, call)))[0]


def _warn_if_truncated(pipe: Any, family: Any, prompt: str, call: dict[str, Any]) -> None:
    """Stock pipelines cut a prompt that is too long, some of them without a word."""
    [length], limit = family.prompt_lengths(pipe, [prompt]), family.prompt_limit(pipe, call)
    if length > limit:
        _log.warning("the prompt has %d tokens and the pipeline cuts it at %d: shorten it", length, limit)


def sample(
    student: str | Path,
    prompt: str,
    image: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    count: int = 1,
    output: str | Path = "samples",
    base: str | Path | None = None,
    device: str | None = None,
    report: Callable[[Path], object] = lambda path: None,
    size: tuple[int, int] | None = None,
    accept: str | None = None,
) -> list[Path]:
    """Write `count` PNGs into `output` and return their paths; image i has the seed `seed + i`.

    `image` is the source of an edit, or several in their order, where the model takes several references. `student`,
    `base` and `accept` as for `load_student`; `device` None or "auto" takes a GPU where there is one. Each image is
    saved, and `report(path)` called, before the next is generated. `size` is (height, width) in pixels; None: the
    settings' own, and of an edit the source's shape. UserError for an empty prompt, a bad count, seed or size, and an
    image that cannot be read.
    """
    check_request(prompt, count, seed)
    if size is not None and min(size) < 16:
        raise UserError(f"the size is {size[1]}x{size[0]} pixels; give at least 16 a side")
    paths = [] if image is None else [image] if isinstance(image, str | Path) else list(image)
    settings = recipe_settings(Path(student))
    editing_base, family = settings.pop("editing_base", None), settings.pop("family", None)
    sources = _sources([Path(path) for path in paths], student, base, editing_base, family, accept)
    folder = Path(output)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    from danceopd.adapters.load import load_student
    from danceopd.common.system import resolve_device

    pipe = load_student(student, base=base, device=resolve_device(device or "auto"), accept=accept)
    pipe.set_progress_bar_config(disable=True)
    written, shown = list[Path](), sources or None
    for i, picture in enumerate(generate(pipe, prompt, shown, seed, count, editing_base, settings, size, family)):
        path = _new_path(folder, prompt, seed + i)
        with disk_errors(path):
            picture.save(path)
        written.append(path)
        report(path)
    return written


def check_request(prompt: str, count: int, seed: int) -> None:
    """UserError for an empty prompt, a bad count or seed."""
    if not prompt.strip():
        raise UserError("the prompt is empty; write what the image should show")
    if not 1 <= count <= 10**6:
        raise UserError(f"{count} images were asked for; ask for one to a million with -n")
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"the seed is {seed}; give a whole number from 0, below 2**63")


def _sources(
    paths: Sequence[Path], student: str | Path, base: str | Path | None, editing_base: str | None, name: str | None,
    accept: str | None,
) -> list[Image]:
    """The source images, opened; UserError for what the base's editing pipeline would not take."""
    found = [open_image(path, alpha=True) for path in paths]
    if not found:
        return []
    from danceopd.pipelines.editing import check_aspect, check_references, editing_class
    from danceopd.pipelines.registry import class_name, family_of

    for path, one in zip(paths, found, strict=True):
        check_aspect(*one.size, str(path))
    if len(found) > 1 or found[0].mode == "RGBA":
        from danceopd.adapters.load import base_of_student

        where = base_of_student(student, base, accept)
        family = family_of(where, name)
        if family.editing is not None:
            check_references(len(found), editing_class(family, class_name(where), editing_base), family, "the edit")
        if not family.alpha:
            found = [open_image(path) for path in paths]
    return found


def recipe_settings(student: Path) -> dict[str, Any]:
    """`call` of the student's recipe, its `editing_base` and its `family`; empty without a recipe."""
    if not (student / "recipe.yaml").is_file():
        return {}
    recipe = recorded_recipe(student)
    call = {"editing_base": recipe.get("editing_base"), "family": recipe.get("family"), **(recipe.get("call") or {})}
    if "steps" in call:
        call["num_inference_steps"] = call.pop("steps")
    return call


def _new_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name from the prompt and the seed that does not exist yet."""
    slug = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60].strip("-") or "picture"
    stem, number = f"{slug}-seed{seed}", 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path
