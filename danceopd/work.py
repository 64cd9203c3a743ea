"""What the teachers are asked about: which rows of the data, as conditions, encoded once by the stock pipeline.

What a run draws is a function of its recipe, so the rows it will ask about are known before a weight is loaded. They
are checked, encoded (only they), and kept in the store that runs share; then the text encoders leave memory. Source
images keep their shape: edits are encoded at the size that the stock pipeline gives their source, each size with its
own noise schedule; prompts at the recipe's height and width.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor

from danceopd.base_model import file_sha256
from danceopd.cache import cache_folder
from danceopd.data import Edits, Prompts, Source, edits_from, image_size, open_image, prompts_from
from danceopd.disk import sha256
from danceopd.errors import UserError
from danceopd.objectives import needs_targets
from danceopd.pipelines.editing import EditingPipeline, editing_pipe, generation_pipe
from danceopd.pipelines.families import family_of
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline, check_prompts
from danceopd.pipelines.record import Condition, stack
from danceopd.recipe import Recipe
from danceopd.routing import pick
from danceopd.sample import call_defaults
from danceopd.store import Store, key_of, missing
from danceopd.variants import Variant, variants

Size = tuple[int, int]  # height, width in pixels
PROOFS = 4
"""First rows of each teacher's data that are encoded whether they are drawn or not: the export is proven on them."""
SQUEEZE = 0.06
"""How far, in the logarithm, a target's aspect ratio may be from that of what is drawn: rounding to whole tokens."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5", ".gguf")


def call_of(base: Path, over: Mapping[str, float], family: Family | None = None) -> dict[str, Any]:
    """How the pipelines are called: the stock settings, the base's own over them, a recipe's over those.

    Classifier-free guidance is off. UserError for a setting of the recipe that `family` (else the base's) lacks.
    """
    family = family or family_of(base)
    known = ("height", "width", "steps", "num_inference_steps", *family.call)
    odd = next((key for key in over if key not in known), None)
    if odd is not None:
        raise UserError(f"call.{odd} means nothing to {family.name}; leave it out of the recipe")
    call = family.stock_call() | {key: value for key, value in call_defaults(base).items() if key in known}
    call["steps"] = call.pop("num_inference_steps")
    return {**call, **over}


def drawers(
    pipe: Any, family: Family, call: dict[str, Any], capabilities: Iterable[str], editing_base: str | None = None
) -> dict[str, GenerationPipeline]:
    """The stock pipelines over one base, by capability; `editing_base` has what an editing pipeline may lack."""
    made: dict[str, GenerationPipeline] = {}
    for capability in dict.fromkeys(capabilities):
        if capability == "editing":
            made[capability] = EditingPipeline(editing_pipe(pipe, editing_base, family), family, call)
        else:
            made[capability] = GenerationPipeline(generation_pipe(pipe, family), family, call)
    return made


@dataclass(frozen=True)
class Asked:
    """The data of one teacher, opened and checked, and the rows of it that the run will draw; for gates, what they
    are also asked as (variants.py)."""

    data: Prompts
    rows: list[int]
    also: Mapping[str, Variant] = field(default_factory=dict)


def open_work(recipe: Recipe) -> dict[str, Asked]:
    """Each teacher's data by its name, opened, with the rows that will be drawn; UserError for any faulty row.

    Where the objective learns from finished pictures, each drawn row must have one.
    """
    targets = needs_targets(recipe)
    opened: dict[tuple[str, str], Prompts] = {}
    for teacher in recipe.teachers:
        source: tuple[str, str] = (recipe.work(teacher), teacher.capability)
        if source not in opened:
            read = edits_from if teacher.capability == "editing" else prompts_from
            opened[source] = read(source[0], recipe.data.rows, recipe.seed, check=False, targets=targets)
    data = [opened[recipe.work(teacher), teacher.capability] for teacher in recipe.teachers]
    drawn = rows_drawn(recipe, [len(d) for d in data])
    for found in opened.values():
        rows = set().union(*(rows for d, rows in zip(data, drawn) if d is found))
        found.check(rows)
        if targets:
            found.check_targets(rows)
    also = variants(recipe, data, drawn)
    return {t.name: Asked(d, sorted(rows), a) for t, d, rows, a in zip(recipe.teachers, data, drawn, also)}


def rows_drawn(recipe: Recipe, lengths: Sequence[int]) -> list[set[int]]:
    """The rows of each teacher's data that the recipe's updates ask about, and the first few, for proofs."""
    shares, per = [recipe.shares()[t.name] for t in recipe.teachers], recipe.routing
    units = recipe.batch // recipe.unit
    drawn = [set(range(min(PROOFS, length))) for length in lengths]
    for step in range(recipe.steps):
        routes, picks = pick(recipe.seed, step, units, shares, lengths, per.per, per.groups)
        for teacher, row in zip(routes, picks):
            drawn[teacher].add(row)
    return drawn


class StoredQuestions:
    """Rows of conditions in the store, as what a teacher is asked about (`questions.Work`).

    `len` counts the rows of the data; only those that were encoded can be read. `layout` of another row is None.
    """

    def __init__(self, store: Store, length: int, keys: Mapping[int, str], sizes: Mapping[int, Size]) -> None:
        self._store, self._length, self._keys, self._sizes = store, length, dict(keys), dict(sizes)
        self._schedules: dict[Size, Tensor] = {}
        same: dict[Hashable, Hashable] = {}  # one tuple for all rows of a layout
        self._layouts = {row: same.setdefault(found, found) for row in keys if (found := self._one(row).layout)}

    def __len__(self) -> int:
        return self._length

    def layout(self, row: int) -> Hashable:
        return self._layouts.get(row)

    def size(self, row: int) -> Size:
        """(height, width) of the row's picture in pixels."""
        return self._sizes[row]

    def sigmas(self, row: int) -> Tensor:
        return self._schedules[self._sizes[row]]

    def rows(self, index: list[int]) -> Condition:
        return stack([self._one(row) for row in index])

    def _one(self, row: int) -> Condition:
        return Condition.from_state(self._store.row(self._keys[row]))


class StoredTargets(StoredQuestions):
    """Stored questions whose rows have right answers (`questions.Targets`); `clean` are their keys."""

    def __init__(
        self, store: Store, length: int, keys: Mapping[int, str], sizes: Mapping[int, Size], clean: Mapping[int, str]
    ) -> None:
        super().__init__(store, length, keys, sizes)
        self._clean = dict(clean)

    def targets(self, index: list[int]) -> Tensor:
        return torch.stack([self._store.row(self._clean[row])["clean"] for row in index])


class Encoder:
    """Conditions from the store, or from the stock pipelines where it lacks them.

    `draw` are the pipelines by capability, `folder` the base's. One text encoder call reads as many prompts of one
    picture size as its pipeline's `chunk`.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        draw: Mapping[str, GenerationPipeline],
        editing_base: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self.family, self.draw = family, dict(draw)
        pipe = next(iter(draw.values())).pipe
        bases = [folder, *([Path(editing_base)] if editing_base and Path(editing_base).is_dir() else [])]
        self._facts = [
            *(encoders_fingerprint(base) for base in bases), editing_base, family.name,
            str(pipe.transformer.dtype), pipe.transformer.device.type, diffusers.__version__, transformers.__version__,
        ]  # fmt: skip
        self.store = Store((cache or cache_folder()) / "conditions" / key_of(*self._facts)[:16])
        self._sized: dict[tuple[Any, ...], GenerationPipeline] = {}

    def sized(self, capability: str, size: Size, steps: int | None = None) -> GenerationPipeline:
        """The pipeline of a capability for another picture size, or another number of steps."""
        drawer = self.draw[capability]
        call = {**drawer.call, "height": size[0], "width": size[1]}
        call["steps"] = steps or call["num_inference_steps"]
        del call["num_inference_steps"]
        if (capability, size, call["steps"]) not in self._sized:
            made = type(drawer)(drawer.pipe, self.family, call, drawer.chunk)
            self._sized[capability, size, call["steps"]] = made
        return self._sized[capability, size, call["steps"]]

    def questions(
        self, capability: str, data: Prompts, rows: Iterable[int], steps: int, targets: bool = False
    ) -> StoredQuestions:
        """These rows of `data`, encoded; their schedules have `steps` steps. `targets`: their pictures, too."""
        keys: dict[int, str] = {}
        sizes: dict[int, Size] = {}
        alike: dict[Hashable, list[int]] = {}
        for row in sorted(set(rows)):
            size, shape, facts = self._facts_of(capability, data, row)
            keys[row], sizes[row] = key_of(capability, *facts), size
            alike.setdefault((size, shape), []).append(row)
        absent = set(missing(self.store, keys.values()))
        with self.store.add() as add:
            for (size, _), group in alike.items():  # type: ignore[misc]
                new = list({keys[row]: row for row in reversed(group) if keys[row] in absent}.values())[::-1]
                drawer = self.sized(capability, size)
                for first in range(0, len(new), drawer.chunk):
                    chunk = new[first : first + drawer.chunk]
                    found = self._encode(drawer, data, chunk).to("cpu")
                    for place, row in enumerate(chunk):
                        add(keys[row], found.rows([place]).state())
        made = StoredQuestions(self.store, len(data), keys, sizes)
        if targets:
            made = StoredTargets(self.store, len(data), keys, sizes, self._targets(capability, data, sizes))
        made._schedules = {size: self.sized(capability, size, steps).sigmas() for size in set(sizes.values())}
        return made

    def _targets(self, capability: str, data: Prompts, sizes: Mapping[int, Size]) -> dict[int, str]:
        """Where each row's clean latents are in the store, encoded if they were not, a chunk at once."""
        keys: dict[int, str] = {}
        absent: dict[Size, dict[str, int]] = {}
        for row, size in sizes.items():
            picture = data.target(row)
            width, height = image_size(picture, data.where(row))
            if abs(math.log(width * size[0] / (height * size[1]))) > SQUEEZE:
                raise UserError(
                    f"{data.where(row)}: the target is {width}x{height} pixels and would be squeezed into "
                    f"{size[1]}x{size[0]}; crop it to that shape"
                )
            keys[row] = key_of("clean", capability, _image_hash(picture), size)
            if not self.store.sound(keys[row]):
                absent.setdefault(size, {})[keys[row]] = row
        with self.store.add() as add:
            for size, new in absent.items():
                drawer, order = self.sized(capability, size), list(new.items())
                for first in range(0, len(order), drawer.chunk):
                    chunk = order[first : first + drawer.chunk]
                    clean = drawer.clean([open_image(data.target(row), data.where(row)) for _, row in chunk])
                    for (key, _), latents in zip(chunk, clean.cpu(), strict=True):
                        add(key, {"clean": latents})
        return keys

    def _facts_of(self, capability: str, data: Prompts, row: int) -> tuple[Size, Size | None, list[Any]]:
        """The row's picture size, its source's size, and what its encoding depends on."""
        call = self.draw[capability].call
        fixed = {key: value for key, value in call.items() if key != "num_inference_steps"}
        if not isinstance(data, Edits):
            size, shape, words, source = (call["height"], call["width"]), None, data[row], None
        else:
            words, picture = data[row]
            shape = image_size(picture, data.where(row))
            size = self.family.size_of(self.draw[capability].pipe, Image.new("1", shape), call)
            source = _image_hash(picture)
        return size, shape, [words, source, {**fixed, "height": size[0], "width": size[1]}]

    def _encode(self, drawer: GenerationPipeline, data: Prompts, rows: list[int]) -> Condition:
        names = [data.where(row) for row in rows]
        if not isinstance(drawer, EditingPipeline):
            words = [data[row] for row in rows]
            check_prompts(drawer.pipe, drawer.family, words, drawer.call, names)
            return drawer.conditions(words)
        edits = [data[row] for row in rows]
        check_prompts(drawer.pipe, drawer.family, [words for words, _ in edits], drawer.call, names)
        sources = [open_image(source, name) for name, (_, source) in zip(names, edits, strict=True)]
        return drawer.conditions([words for words, _ in edits], sources)


def release_encoders(encoder: Encoder, *pipes: Any) -> None:
    """Lets the text encoders out of memory, of the GPU too: `encoder`'s pipelines and `pipes` no longer hold them.

    The VAE stays, for sample grids are decoded by it. Pipelines can still say their noise and schedule, and draw
    from conditions that they were given.
    """
    drawers_ = [*encoder.draw.values(), *encoder._sized.values()]
    for pipe in (*pipes, *(d.pipe for d in drawers_), *(d._plain for d in drawers_)):
        for name in encoder.family.text_components:
            if getattr(pipe, name, None) is not None:
                setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encoders_fingerprint(folder: Path) -> str:
    """sha256 over all that turns prompts and images into conditions: every file of the pipeline but the
    transformer's weights."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = sorted(name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir())
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    for part in parts:
        for file in sorted((folder / part).rglob("*")):
            weights = file.suffix in WEIGHTS
            if not file.is_file() or file.name.startswith(".") or weights and part.startswith("transformer"):
                continue
            if not weights or file.suffix == ".safetensors":
                digest.update(f"\n{file.relative_to(folder).as_posix()} {file_sha256(file)}".encode())
    return digest.hexdigest()


def _image_hash(source: Source) -> str:
    """Of an image's content: the bytes of a file, or size and pixels."""
    if isinstance(source, Path):
        return sha256(source)
    return hashlib.sha256(f"{source.mode} {source.size}".encode() + source.tobytes()).hexdigest()
