"""Pictures from a student, drawn by the stock diffusers pipeline exactly as anyone else would draw them.

The only things added are the base's own settings (`danceopd.json` beside its `model_index.json`: size, steps,
guidance), one CPU generator a picture (`seed + i`), and a file name that never replaces a picture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Source, open_image
from .disk import disk_faults
from .errors import UserError
from .sentences import read_yaml

if TYPE_CHECKING:
    from PIL.Image import Image

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
    drawn = []
    for i in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        drawn.append(pipe(prompt=prompt, generator=generator, **call).images[0])
    return drawn


def sample(
    student: str | Path,
    prompt: str,
    image: str | Path | None = None,
    seed: int = 0,
    count: int = 1,
    output: str | Path = "samples",
    base: str | Path | None = None,
    device: str | None = None,
) -> list[Path]:
    """Writes `count` PNGs into `output` and says where; picture i has the seed `seed + i`.

    `student` and `base` as for `load_student`; `device` None or "auto" takes a GPU where there is one.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; write what the picture should show")
    if count < 1:
        raise UserError(f"{count} pictures were asked for; ask for at least one with -n")
    if seed < 0:
        raise UserError(f"the seed is {seed}; give a whole number from 0")
    source = None if image is None else open_image(Path(image))
    folder = Path(output)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)

    import torch

    from .student import load_student

    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_student(student, base=base, device=device)
    pipe.set_progress_bar_config(disable=True)
    written = []
    for i, picture in enumerate(pictures(pipe, prompt, source, seed, count, **_trained(Path(student)))):
        path = _free(folder, prompt, seed + i)
        with disk_faults(path):
            picture.save(path)
        written.append(path)
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
