"""Pictures from a student, drawn by the stock diffusers pipeline exactly as anyone else would draw them.

The only things added are the base's own settings (`danceopd.json` beside its `model_index.json`: size, steps,
guidance), one CPU generator a picture (`seed + i`), and a file name that never replaces a picture.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Source, open_image
from .disk import disk_faults
from .errors import UserError
from .sentences import read_yaml

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger("danceopd")
CALL_KEYS = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")


def call_defaults(base: str | Path) -> dict[str, Any]:
    """What a base wants its pipeline called with; empty where it has no `danceopd.json`."""
    path = Path(base) / "danceopd.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {key: settings[key] for key in CALL_KEYS if settings.get(key) is not None}
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path} is not a JSON object with the base's settings ({error}); restore it") from None


def pictures(
    pipe: Any,
    prompt: str,
    image: Source | None = None,
    seed: int = 0,
    count: int = 1,
    editing_base: str | None = None,
    **over: Any,
) -> list[Image]:
    """`count` pictures of a prompt (an edit of `image` if there is one) from a loaded stock pipeline.

    `editing_base` has what the base's editing pipeline may lack; `over` goes over the base's own settings.
    """
    return list(_drawn(pipe, prompt, image, seed, count, editing_base, over))


def _drawn(
    pipe: Any,
    prompt: str,
    image: Source | None,
    seed: int,
    count: int,
    editing_base: str | None,
    over: dict[str, Any],
) -> Iterator[Image]:
    """One after the other, so that each can be kept before the next is drawn."""
    import torch

    from .pipelines.editing import editing_pipe, generation_pipe
    from .pipelines.families import family_of

    call = call_defaults(pipe.config.get("_name_or_path") or "") | over
    family = family_of(pipe)
    if image is None:
        pipe = generation_pipe(pipe, family)
    else:
        pipe = editing_pipe(pipe, editing_base, family)
        call["image"] = open_image(image)
    call = family.extra(pipe, call) | call
    _warn_of_a_cut(pipe, family, prompt, call)
    for i in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        yield pipe(prompt=prompt, generator=generator, **call).images[0]


def _warn_of_a_cut(pipe: Any, family: Any, prompt: str, call: dict[str, Any]) -> None:
    """Stock pipelines cut a prompt that is too long, some of them in silence."""
    [length], limit = family.prompt_lengths(pipe, [prompt]), family.prompt_limit(pipe, call)
    if length > limit:
        _log.warning("the prompt has %d tokens and the pipeline cuts it at %d: shorten it", length, limit)


def sample(
    student: str | Path,
    prompt: str,
    image: str | Path | None = None,
    seed: int = 0,
    count: int = 1,
    output: str | Path = "samples",
    base: str | Path | None = None,
    device: str | None = None,
    report: Callable[[Path], object] = lambda path: None,
) -> list[Path]:
    """Writes `count` PNGs into `output` and says where; picture i has the seed `seed + i`.

    `student` and `base` as for `load_student`; `device` None or "auto" takes a GPU where there is one. Each picture is
    written, and told to `report`, before the next is drawn.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; write what the picture should show")
    if count < 1:
        raise UserError(f"{count} pictures were asked for; ask for at least one with -n")
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"the seed is {seed}; give a whole number from 0, below 2**63")
    source = None if image is None else open_image(Path(image))
    folder = Path(output)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)

    from .extract import device_of
    from .student import load_student

    pipe = load_student(student, base=base, device=device_of(device or "auto"))
    pipe.set_progress_bar_config(disable=True)
    over, written = _trained(Path(student)), []
    editing_base = over.pop("editing_base", None)
    for i, picture in enumerate(_drawn(pipe, prompt, source, seed, count, editing_base, over)):
        path = _free(folder, prompt, seed + i)
        with disk_faults(path):
            picture.save(path)
        written.append(path)
        report(path)
    return written


def _trained(student: Path) -> dict[str, Any]:
    """The editing base of the student's own recipe, and what that puts over the base's settings."""
    if not (student / "recipe.yaml").is_file():
        return {}
    recipe = read_yaml(student / "recipe.yaml", "recipe")
    call = {"editing_base": recipe.get("editing_base"), **(recipe.get("call") or {})}
    if "steps" in call:
        call["num_inference_steps"] = call.pop("steps")
    return call


def _free(folder: Path, prompt: str, seed: int) -> Path:
    """A name that says what the picture is and that no file has yet."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60].strip("-") or "picture"
    stem, number = f"{words}-seed{seed}", 1
    while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path
