"""What the files of a merge are: the base, and teachers with a name, a rank and the capability that they seem to have.

All is taken from `danceopd inspect`: headers, metadata and names; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danceopd.cli.inspect import describe
from danceopd.common.shipped import SHIPPED
from danceopd.errors import UserError
from danceopd.recipe.checks import TAKEN

EDITS = re.compile(
    r"(?<![a-z])(edit(?!ion|orial)|kontext|inpaint|remov|replac|retouch|relight|instruct|pix2pix|try-?on|erase)",
    re.IGNORECASE,
)
"""In the name of a file, or of the base that it was trained on: it edits."""
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_FILES = ("pytorch_lora_weights", "adapter_model", "model", "lora")
"""Names of files that say nothing; their folder's name does."""
BASES = {
    "flux1": "black-forest-labs/FLUX.1-dev", "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-dev": "black-forest-labs/FLUX.2-dev", "qwen-image": "Qwen/Qwen-Image", "z-image": "Tongyi-MAI/Z-Image",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
}  # fmt: skip
"""A base of each family, which is proposed and never assumed."""
EDITING_BASES = {"qwen-image": "Qwen/Qwen-Image-Edit"}
"""What has the parts that a base of the family lacks to edit."""


@dataclass(frozen=True)
class TeacherFile:
    """A file that may teach: `capability` is what its name or base says, None where neither does."""

    path: str
    name: str
    rank: int
    families: tuple[str, ...]
    base: str | None
    capability: str | None

    @property
    def about(self) -> str:
        """One line on it."""
        if self.path == "base":
            return "the base itself"
        what = f"a LoRA of rank {self.rank}" if self.rank else "a whole model"
        return f"{self.path}: {what}" + (f", for {' or '.join(self.families)}" if self.families else "")


def look(path: str, is_base: bool = False) -> TeacherFile | str:
    """A teacher, or the path of a base model; UserError for what can be neither.

    Of whole models the folder of a pipeline is the base, unless that is known (`is_base` False and the caller has one).
    """
    facts = describe(path)
    if refused := facts.get("refused"):
        raise UserError(f"{path}: {refused}")
    kind = facts["kind"]
    if kind == "pipeline" and is_base:
        return path
    if kind == "run" and "rank" not in facts:
        raise UserError(f"{path} is a run without a student yet; give a LoRA, or run `danceopd merge` on it to its end")
    base = facts.get("base") if kind in ("LoRA", "DoRA", "LoKr", "LoHa", "run") else None
    words = f"{_name(path)} {Path(base or '').name}"
    return TeacherFile(
        path, _name(path), int(facts.get("rank") or 0), tuple(facts.get("family") or ()),
        base if base and (Path(base).is_dir() or HUB.fullmatch(base) or base in SHIPPED) else None,
        "editing" if EDITS.search(words) else None,
    )  # fmt: skip


def named_apart(teachers: Iterable[TeacherFile]) -> list[TeacherFile]:
    """The teachers, each with its own name, and none with one that means something else."""
    found: list[TeacherFile] = []
    for one in teachers:
        name, number = one.name, 1
        while name in (*TAKEN, *(other.name for other in found)):
            number += 1
            name = f"{one.name}-{number}"
        found.append(replace(one, name=name))
    return found


def shared_base(teachers: Iterable[TeacherFile]) -> str | None:
    """The base that the files name; None where none does. UserError where they name several."""
    named: dict[str, Any] = {one.base: one.path for one in teachers if one.base}
    if len(named) > 1:
        (a, first), (b, second) = list(named.items())[:2]
        raise UserError(
            f"{first} was trained on {a} and {second} on {b}, and a merge has one base; leave one out, or give --base"
        )
    return next(iter(named), None)


def _name(path: str) -> str:
    place = Path(path)
    stem = place.name.removesuffix(".safetensors")
    stem = place.absolute().parent.name if stem.lower() in WEIGHT_FILES else stem
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "teacher"
