"""A run without its weights: models on the meta device, the data opened, and the pictures that it will draw.

`outline` refuses what a merge would refuse later, as far as configurations, headers and the data's tables tell
(`checks.py`), so a merge makes one before it loads anything, and `danceopd plan` makes nothing else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.read import adapter_shapes
from danceopd.common.safetensors import read_header
from danceopd.data.dataset import Size, TeacherData, open_datasets
from danceopd.data.sources import Edits
from danceopd.engine.teachers import TeacherWeights
from danceopd.errors import UserError
from danceopd.kernels.autotune import model_spec
from danceopd.labelfree.gates.variants import with_variants
from danceopd.models.base import empty_transformer, pipeline_call, pipeline_index
from danceopd.models.flops import TokenCounts, forward_flops
from danceopd.models.lora import Adapter
from danceopd.models.source_cache import check_source_cache
from danceopd.pipelines.editing import editing_pipe
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import empty_module
from danceopd.pipelines.registry import class_name, family_of
from danceopd.planning import checks
from danceopd.planning.plugins import check_plugins
from danceopd.planning.sources import about_bank
from danceopd.recipe.recipe import Recipe
from danceopd.run.trackers.tracker import check_trackers

LOOKED = 256
"""Source images of a teacher whose sizes are read."""


@dataclass(frozen=True)
class Picture:
    """A picture size of a capability: its share of the capability's rows, its tokens, FLOPs of one forward."""

    capability: str
    size: Size
    share: float
    tokens: TokenCounts
    flops: float

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        tokens = {"picture": self.tokens.image, "source": self.tokens.source, "text": self.tokens.text}
        return {"capability": self.capability, "size": self.size, "share": self.share, **tokens, "flops": self.flops}


@dataclass(frozen=True)
class Outline:
    """What a run will hold and draw. `transformer` is on the meta device, `pipe` a stock pipeline without weights,
    `adapters` the shapes of each teacher's adapter (None: the bare base), `modules` the layers that the student adapts.
    """

    folder: Path
    family: Family
    transformer: nn.Module
    pipe: Any
    call: dict[str, Any]
    teachers: Sequence[TeacherWeights]
    adapters: Mapping[str, Adapter | None]
    modules: Mapping[str, nn.Linear]
    datasets: Mapping[str, TeacherData]
    pictures: Sequence[Picture]
    saved: str | None = None  # in which kind the base was saved quantised
    stored_bytes: int | None = None  # of the transformer's file, where that is quantised
    whole: bool = True  # whether the base's transformer is in its folder in full precision
    notes: list[str] = field(default_factory=list)
    refused: str | None = None  # why a merge would refuse it, though it can be outlined
    _schedules: dict[tuple[Size, int], Tensor] = field(default_factory=dict)

    @property
    def may_be_stored_otherwise(self) -> bool:
        """Whether the base could be quantised or offloaded: it was not saved quantised, and no teacher is streamed."""
        return self.saved is None and not any(one.checkpoint and one.teacher.residual == 0 for one in self.teachers)

    def kept(self, recipe: Recipe) -> str | None:
        """In which kind the base is quantised; None where it is not."""
        return self.saved or recipe.base_dtype

    def sigmas(self, size: Size, steps: int) -> Tensor:
        """The noise schedule (N+1,) of rollouts at a picture size."""
        if (size, steps) not in self._schedules:
            call = {**self.call, "height": size[0], "width": size[1], "num_inference_steps": steps}
            self._schedules[size, steps] = GenerationPipeline(self.pipe, self.family, call).sigmas()
        return self._schedules[size, steps]

    @cached_property
    def largest(self) -> TokenCounts:
        """Tokens of the largest row."""
        return max((p.tokens for p in self.pictures), key=lambda tokens: tokens.all)

    @cached_property
    def components(self) -> dict[str, int]:
        """Numbers in each part's safetensors, by their headers; of several precisions, the plain files."""
        found: dict[str, int] = {}
        for part in sorted(p for p in self.folder.iterdir() if p.is_dir()):
            files = sorted(part.glob("*.safetensors"))
            plain = [file for file in files if not re.search(r"\.(fp16|bf16|fp8\w*)\b", file.name)] or files
            for file in plain:
                numbers = sum(math.prod(shape) for shape in read_header(file).shapes.values())
                found[part.name] = found.get(part.name, 0) + numbers
        return found

    @cached_property
    def tried(self) -> nn.Module:
        """The transformer with two blocks of a kind, as the kernels are tried on, on the meta device."""
        with torch.device("meta"):
            return type(self.transformer).from_config(model_spec(self.transformer)["config"])  # type: ignore[attr-defined]

    def row_flops(self, recipe: Recipe) -> dict[str, float]:
        """FLOPs of one forward of an average row, by capability."""
        flops: dict[str, float] = {t.capability: 0.0 for t in recipe.teachers}
        for p in self.pictures:
            flops[p.capability] += p.share * p.flops
        return flops

    def at_size(self, recipe: Recipe, side: int) -> Outline:
        """The same with pictures of the area of a square of `side` pixels."""
        call = {**self.call, "height": side, "width": side}
        pictures = _pictures(recipe, self.datasets, self.pipe, self.family, call, self.transformer)
        return replace(self, call=call, pictures=pictures)


def outline(recipe: Recipe, folder: Path, teachers: Sequence[TeacherWeights]) -> Outline:
    """The outline of a merge on the base in `folder`; UserError for what the merge would refuse.

    `teachers` as `check_teachers` returns them.
    """
    own = check_plugins(recipe)
    check_trackers(recipe.trackers)
    family, transformer = family_of(folder, recipe.family), empty_transformer(folder)
    saved, stored_bytes, whole = checks.check_storage(recipe, folder, transformer)
    checks.check_encoders(folder, family)
    if recipe.rollout.cache_source:
        check_source_cache(family)
    streamed = [replace(one, streamed=True) for one in teachers if one.checkpoint and one.teacher.residual == 0]
    checks.check_streamed(recipe, streamed, sharded=False)
    call = pipeline_call(folder, recipe.call, family)
    adapters = {one.teacher.name: _shapes(one, transformer) for one in teachers}
    checks.check_start(recipe, adapters)
    datasets = with_variants(
        recipe.gates, recipe.sampling, recipe.rollout.steps, recipe.teachers, open_datasets(recipe, family.alpha),
        captions="caption" in recipe.nft.contexts,
    )  # fmt: skip
    checks.check_contrast(recipe, datasets)
    checks.check_sources(recipe, datasets, family, class_name(folder))
    pipe = _pipeline(folder, family, transformer)
    notes = own + checks.check_settings(recipe, family, pipe, call)
    notes += checks.check_prompts_of(recipe, folder, family, pipe, call, datasets)
    notes += about_bank(recipe, datasets)
    refused = None
    if recipe.has("editing") and recipe.editing_base is None and class_name(folder) == family.generation:
        try:
            editing_pipe(pipe, None, family)
        except UserError as error:
            refused = str(error)
    pictures = _pictures(recipe, datasets, pipe, family, call, transformer)
    if recipe.needs_targets:
        checks.check_target_shapes(recipe, datasets, family, pipe, call)
    modules = _student_modules(recipe, adapters, transformer, family)
    return Outline(
        folder, family, transformer, pipe, call, teachers, adapters, modules, datasets, pictures, saved, stored_bytes,
        whole, notes, refused,
    )  # fmt: skip


def _shapes(weights: TeacherWeights, transformer: nn.Module) -> Adapter | None:
    """The shapes of a teacher's adapter; of a whole model, those of its difference at the recipe's rank."""
    if weights.checkpoint is None or weights.adapter is not None:
        return weights.adapter
    rank, tensors = weights.teacher.rank, {}
    for path, m in transformer.named_modules():
        if isinstance(m, nn.Linear):
            r = min(rank, m.in_features, m.out_features)
            tensors[path] = tuple(torch.empty(*s, device="meta") for s in ((r, m.in_features), (m.out_features, r)))
    return Adapter(tensors)  # type: ignore[arg-type]


def _student_modules(
    recipe: Recipe, adapters: Mapping[str, Adapter | None], transformer: nn.Module, family: Family
) -> dict[str, nn.Linear]:
    """The layers that the student adapts: the family's targets, and those of what it starts as."""
    init = recipe.student.init
    if init == "blend":
        starts = list(adapters.values())
    elif init in adapters or init == "base":
        starts = [adapters.get(init)]
    else:
        starts = [adapter_shapes(init, transformer)]
    extra = {path for adapter in starts if adapter is not None for path in adapter.tensors}
    return {
        path: m
        for path, m in transformer.named_modules()
        if isinstance(m, nn.Linear) and (path in extra or re.fullmatch(family.lora_targets, path))
    }


class _NoProcessor:
    """Stands in for a processor of pictures and text, of which a pipeline reads how long its template is."""

    image_processor = None

    def apply_chat_template(self, *args: Any, **options: Any) -> list[list[int]]:
        return [[]]

    @property
    def tokenizer(self) -> _NoProcessor:
        return self

    def encode(self, text: str) -> list[int]:
        return [0]


def _pipeline(folder: Path, family: Family, transformer: nn.Module) -> Any:
    """The stock generation pipeline without a weight: its models are their configurations, its tokenizers real."""
    import diffusers
    import transformers

    index = pipeline_index(folder)
    kind = getattr(diffusers, family.generation)
    needed, settings = kind._get_signature_keys(kind)
    parts: dict[str, Any] = dict.fromkeys(needed)
    parts["transformer"] = transformer  # some pipelines set its processors
    with checks.does_not_load(folder / "scheduler"):
        parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    with checks.does_not_load(folder / "vae"), torch.device("meta"):
        vae = getattr(diffusers, index["vae"][1])
        parts["vae"] = empty_module(vae.from_config(vae.load_config(folder / "vae")), torch.empty(0, device="cpu"))
    for name in (n for n in checks.tokenizers(index) if n in needed and (folder / n).is_dir()):
        with checks.does_not_load(folder / name):
            parts[name] = getattr(transformers, index[name][1]).from_pretrained(folder / name)
    parts |= {name: _NoProcessor() for name in needed if name.endswith("processor")}
    same = class_name(folder) == family.generation
    pipe = kind(**parts, **({key: index[key] for key in settings if key in index} if same else {}))
    pipe.transformer = empty_module(transformer, torch.empty(0))  # a device and a dtype, no weight
    return pipe


def _pictures(
    recipe: Recipe, datasets: Mapping[str, TeacherData], pipe: Any, family: Family, call: dict[str, Any],
    transformer: nn.Module,
) -> list[Picture]:  # fmt: skip
    """Picture sizes by capability, the commonest first."""
    found: dict[str, Counter[Size]] = {}
    sources = 1  # of an edit, at most
    settings = {key: value for key, value in call.items() if key != "num_inference_steps"}
    for teacher in recipe.teachers:
        sizes = found.setdefault(teacher.capability, Counter())
        mine = datasets[teacher.name]
        if isinstance(mine.data, Edits):
            for row in mine.rows[:: max(1, len(mine.rows) // LOOKED)]:
                shapes = mine.data.sizes(row)
                sizes[family.edited_size(pipe, shapes, settings)] += 1
                sources = max(sources, len(shapes))
        else:
            sizes[family.drawn(pipe, call["height"], call["width"])] += 1
    side, frames = family.token_side(pipe), family.frames(pipe, call)
    pictures = []
    for capability, sizes in found.items():
        for size, count in sizes.most_common():
            tokens = frames * (size[0] // side) * (size[1] // side)
            edits, text = capability == "editing", call.get("max_sequence_length") or 512
            one = TokenCounts(tokens, edits * sources * tokens, text + edits * sources * family.source_text)
            pictures.append(Picture(capability, size, count / sizes.total(), one, forward_flops(transformer, one)))
    return pictures
