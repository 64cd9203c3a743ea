"""Prompts and edits for the LoRAs of a blend, and the recording of what its layers see.

`--data` is said once for all LoRAs or once for each: any source of prompts or edits (docs/data.md), or the recipe of a
merge, whose teachers the LoRAs are; its scales and guidance are not used, the command's weights are. A recipe is made
of the command's arguments, so that everything a merge refuses is refused here before a model is loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from danceopd.adapters.blend import blend_parts
from danceopd.adapters.blending.layers import LayerRule
from danceopd.adapters.blending.methods import Method
from danceopd.adapters.header import adapter_file
from danceopd.adapters.regression.moments import features, moments_bytes
from danceopd.assembly import open_base, place
from danceopd.cli.blending.asked import Asked
from danceopd.common.console import progress_bar
from danceopd.common.shipped import portable
from danceopd.common.system import resolve_device
from danceopd.data.encode import Encoder, free_encoders, park_components
from danceopd.data.sources import Edits, edits_from
from danceopd.engine.calibration.inputs import ROOM, RecordedInputs, stages
from danceopd.engine.calibration.states import Questions, spread
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.models.base import base_folder, transformer_folders
from danceopd.models.lora import Adapter
from danceopd.planning.cards import card_here
from danceopd.planning.outline import Outline
from danceopd.planning.settings import prepare
from danceopd.recipe.checks import TAKEN
from danceopd.recipe.recipe import Recipe

_log = logging.getLogger("danceopd")

SHIPPED_DATA = {
    "generation": ("generation", "scenes"), "editing": ("editing", "scenes"),
    "local-edit": ("editing", "scenes:local"), "global-edit": ("editing", "scenes:global"),
}  # fmt: skip
"""Of the shipped LoRAs: what each does, and the data for it."""
KEPT = {"call", "family", "editing_base", "rollout", "data", "dtype", "base_dtype", "gguf", "offload"}
"""Keys of a merge's recipe that a recording follows."""


@dataclass(frozen=True)
class Calibration:
    """A recording that was checked and not begun: its recipe, the base's folder, and the rows of each LoRA."""

    recipe: Recipe
    base: Path
    run: Outline
    rows: dict[str, list[int]]
    how: Method

    def said(self) -> list[str]:
        """What is recorded, a line for each LoRA."""
        lines = []
        for teacher in self.recipe.teachers:
            what = "edits" if teacher.capability == "editing" else "prompts"
            source = portable(self.recipe.data_source(teacher))
            lines.append(
                f"inputs of {teacher.name}: {len(self.rows[teacher.name])} {what} of {source}, at "
                f"{self.recipe.rollout.steps} noise levels"
            )
        return lines

    def memory(
        self, adapters: Sequence[Adapter], weights: Sequence[float], layers: Sequence[LayerRule] = ()
    ) -> tuple[int, int]:
        """(bytes of the base's transformer, bytes of the moments at most), about."""
        how, sizes, largest = self.how, dict[str, int](), 0
        for name, part in blend_parts(adapters, weights, how, layers).items():
            pairs = [adapters[i].tensors[name] for i in part.adapters if name in adapters[i].tensors]
            ranks, into = sum(a.shape[0] for a, _ in pairs), pairs[0][0].shape[1]
            sizes[name] = moments_bytes(ranks, into, how.latent)
            largest = max(largest, features(ranks, into, how.latent))
        each = [sum(sizes[name] for name in stage) for stage in stages(list(sizes), sizes, how.sequential, ROOM)]
        item = 2 if self.recipe.dtype in ("bf16", "fp16") else 4
        return item * self.run.components.get("transformer", 0), max(each) + 24 * largest**2  # solved in fp64

    @contextmanager
    def recording(self) -> Iterator[RecordedInputs]:
        """Load the base, encode the rows, and be ready to record."""
        recipe, device, questions = self.recipe, resolve_device(self.recipe.device), []
        capabilities = [teacher.capability for teacher in recipe.teachers]
        opened = open_base(recipe, self.base, self.run.saved, device, capabilities)
        encoder = Encoder(self.base, opened.family, opened.pipelines, recipe.editing_base)
        for teacher in recipe.teachers:
            data, rows = self.run.datasets[teacher.name].data, self.rows[teacher.name]
            questions.append(Questions(encoder.encode(teacher.capability, data, rows, recipe.rollout.steps), rows))
        free_encoders(encoder, opened.pipe)
        park_components(encoder)
        if said := place(recipe, opened, device):
            _log.info(said)
        with progress_bar("recording", ends=True) as report, RecordedInputs(
            opened.backbone, questions, device, recipe.seed, recipe.rows_at_once, report
        ) as inputs:
            yield inputs


def calibration(
    asked: Asked, how: Method, base: str | None, files: Sequence[Path], adapters: Sequence[Adapter], output: Path,
    seed: int,
) -> Calibration:  # fmt: skip
    """Check all that a recording needs; UserError for what is missing, before a weight of the base is loaded.

    `base` is a path or a name, or None where nobody names one. `adapters` may be on the meta device.
    """
    method, said = how.name, [spec for spec in asked.data if Path(spec).suffix.lower() in (".yaml", ".yml")]
    if len(files) < 2:
        raise UserError(f"{method} merges two LoRAs or more, and here is one; add another")
    given = Recipe.load(Path(said[0])) if said else None
    if given is not None and len(asked.data) > 1:
        raise UserError(f"--data names the recipe {said[0]} and other data; give the recipe alone, or none")
    base = base or (None if given is None else given.base)
    if base is None:
        raise UserError(
            f"{method} runs the base model to record inputs of its layers, and no LoRA here names its base, or it is "
            "not on this machine; give it with --base"
        )
    teachers = _of_recipe(given, files, said[0]) if given is not None else _of_sources(asked.data, files, base, method)
    count = asked.prompts or how.prompts
    fields = {} if given is None else given.model_dump(include=KEPT)
    drawn = {"steps": 4, "batch": max(2, min(2**14, count * len(files))), "micro_batch": "auto"}
    device = asked.device or ("auto" if given is None else given.device)
    fields |= {"base": base, "teachers": teachers, "output": output, "seed": seed, "device": device}
    recipe = Recipe("the blend", **fields, **drawn)
    folder = base_folder(recipe.base)
    if len(transformer_folders(folder)) > 1:
        raise UserError(
            f"{method} records inputs on a base of one transformer, and {folder} has two; take a method that needs no "
            "base, such as linear or ties"
        )
    weights = [TeacherWeights(teacher, adapter) for teacher, adapter in zip(recipe.teachers, adapters, strict=True)]
    prepared = prepare(recipe, folder, weights, card_here(resolve_device(device)), ended=False, room=False)
    assert prepared.run is not None
    if prepared.run.refused:
        raise UserError(prepared.run.refused)
    rows = {name: spread(data.rows, count) for name, data in prepared.run.datasets.items()}
    return Calibration(prepared.recipe, folder, prepared.run, rows, how)


def _of_recipe(recipe: Recipe, files: Sequence[Path], where: str) -> list[dict]:
    """The teachers of a recipe that these LoRAs are."""
    held = {adapter_file(t.adapter).resolve(): t for t in recipe.teachers if t.adapter != "base"}
    found = []
    for file in files:
        teacher = held.get(file.resolve())
        if teacher is None:
            names = ", ".join(portable(t.adapter) for t in recipe.teachers)
            raise UserError(f"{where} has no teacher with the LoRA {file}; its teachers are {names}")
        found.append(teacher.model_dump() | {"guidance": None, "negative": None, "scale": 1.0, "weight": 1.0})
    return found


def _of_sources(sources: Sequence[str], files: Sequence[Path], base: str, method: str) -> list[dict]:
    """A teacher for each LoRA, with the data that is named for it."""
    names = _named(files)
    if not sources:
        kinds = [SHIPPED_DATA.get(portable(str(file.parent))) for file in files]
        if None in kinds or portable(base_folder(base).as_posix()) != "base":
            raise UserError(
                f"{method} records inputs on prompts or edits that suit each LoRA; give --data FILE once for each, in "
                "their order, once for all, or the recipe of a merge of them"
            )
    elif len(sources) not in (1, len(files)):
        raise UserError(
            f"--data is given {len(sources)} times for {len(files)} LoRAs; give it once for all, or once for each"
        )
    else:
        each = list(sources) * (1 if len(sources) == len(files) else len(files))
        kinds = [_kind(source) for source in each]
    return [
        {"name": name, "adapter": str(file), "capability": kind[0], "data": kind[1]}
        for name, file, kind in zip(names, files, kinds)
        if kind is not None
    ]


def _kind(source: str) -> tuple[str, str]:
    """(capability, source) of `[generation=|editing=]SOURCE`; without the word, rows with a source are edits."""
    word, sign, rest = source.partition("=")
    if sign and word in ("generation", "editing"):
        return word, rest
    if source.partition(":")[0] == "scenes":
        raise UserError(f"--data {source} has prompts and edits; write generation={source} or editing={source}")
    if source.startswith("hub:"):
        raise UserError(f"--data {source}: say what it holds, as generation={source} or editing={source}")
    if not Path(source).expanduser().exists():
        raise UserError(f"--data {source} does not exist; give a file or a folder of prompts or edits, or a recipe")
    try:
        edits: Edits = edits_from(source, check=False)
        edits[0]
    except UserError:
        return "generation", source
    return "editing", source


def _named(files: Sequence[Path]) -> list[str]:
    """A teacher's name for each LoRA, from its folder or file."""
    words = [file.parent.name for file in files]
    words = words if len(set(words)) == len(words) else [file.stem for file in files]
    words = [re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-_") or "lora" for word in words]
    return [f"{word}-{i + 1}" if words.count(word) > 1 or word in TAKEN else word for i, word in enumerate(words)]
