"""Which models a bench compares: the student, the base, its recipe's teachers, a naive blend, anything by path.

Names become a `Lineup` without any weight of the base being loaded, so misspelt names cost nothing. All LoRAs
ride on ONE backbone; a fused pipeline brings its own transformer and must share the base's text encoder and
autoencoder, since prompts are encoded once for everybody. Two names for the same weights are sampled once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from danceopd.base_model import base_fingerprint, base_folder, empty_transformer
from danceopd.blend import METHODS, blend, scaled
from danceopd.disk import sha256
from danceopd.errors import UserError
from danceopd.lora import Adapter, read_adapter
from danceopd.lora_file import adapter_file, inspect_adapter
from danceopd.recipe import Recipe
from danceopd.sentences import nearest
from danceopd.shipped import SHIPPED, portable, shipped

RESERVED = ("source", "target")
"""Folders of a bench that are no models."""
LARGE = 1_000_000_000
"""Above this many parameters a LoRA runs beside the weights instead of in a merged copy of them."""


@dataclass(frozen=True)
class Model:
    """One row of the table. `adapter` None with `pipeline` None is the bare base."""

    name: str  # of its folder and in every row; unique
    label: str
    role: str  # base, teacher, blend, student or other
    path: str  # where it comes from; a shipped checkpoint by its name
    sha256: str
    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    pipeline: Path | None = None
    weights: tuple[float, ...] = ()  # of a blend, in the order of the recipe's teachers
    method: str = ""  # of a blend
    capability: str | None = None  # of a teacher


@dataclass(frozen=True)
class Lineup:
    """The base everything rides on, and the models in the order of the table, the student last."""

    base: Model
    folder: Path  # of the base
    models: tuple[Model, ...]
    call: dict[str, int]  # the recipe's, over the base's own

    @property
    def student(self) -> Model:
        """The model under test."""
        return self.models[-1]

    def teachers_first_of(self, capability: str) -> list[str]:
        """Names of the teachers, those of a capability first (they win a tie)."""
        found = [m for m in self.models if m.role == "teacher"]
        return [m.name for m in sorted(found, key=lambda m: m.capability != capability)]

    def roles(self, role: str) -> list[str]:
        """Names of the models in a role."""
        return [m.name for m in self.models if m.role == role]


def sha256_of(path: Path) -> str:
    """Of a file's bytes; of a folder, over the names and hashes of its weights and configurations."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    return sha256(path)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_") or "model"


def _is_pipeline(path: Path) -> bool:
    return path.is_dir() and (path / "model_index.json").is_file()


def _recipe_of(path: Path) -> Recipe:
    """The recipe beside a student; else the default one, on the base that its file names."""
    folder = path if path.is_dir() else path.parent
    if (folder / "recipe.yaml").is_file():
        return Recipe.from_yaml(folder / "recipe.yaml")
    base = None if _is_pipeline(path) else inspect_adapter(path).record.get("base")
    return Recipe(base=base) if base else Recipe()


def _path_of(name: str, what: str) -> Path:
    """A shipped name or an existing path."""
    if name in SHIPPED:
        return shipped(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"{what} {name!r} does not exist (looked at {path.absolute()}); give a run folder, a LoRA's "
            f"folder or file, a fused pipeline, or one of {', '.join(SHIPPED)}"
        )
    return path


def _weights_of(word: str, teachers: int, method: str = "linear") -> tuple[float, ...]:
    """The weights in `blend`, `blend:0.3` (the first of two teachers) or `blend:0.3/0.3/0.4`."""
    _, _, text = word.partition(":")
    if not text:
        return tuple(METHODS[method].weights(teachers))
    try:
        weights = tuple(float(part) for part in text.split("/"))
    except ValueError:
        weights = ()
    if len(weights) == 1 and teachers == 2:
        weights = (weights[0], round(1 - weights[0], 9))
    if len(weights) != teachers or not all(-10 <= w <= 10 for w in weights):
        raise UserError(
            f"{word!r} does not give {teachers} teachers their weights; write "
            f"blend:{'/'.join(['%.2f' % (1 / teachers)] * teachers)}"
            + (", or blend:0.5 for the share of the first" if teachers == 2 else "")
        )
    return weights


class _Builder:
    """Turns names into models against one recipe."""

    def __init__(self, student: str | Path, recipe: Recipe | None) -> None:
        self.path = _path_of(str(student), "the student")
        self.recipe = recipe or _recipe_of(self.path)
        self.folder = base_folder(self.recipe.base)
        self.teachers = {t.name: t for t in self.recipe.teachers}
        self._like = empty_transformer(self.folder)
        self._adapters: dict[Path, Adapter] = {}
        self._base = Model("base", "base", "base", portable(self.recipe.base), sha256_of(self.folder))

    def adapter(self, file: Path) -> Adapter:
        """A LoRA that belongs to the base, N of N tensors."""
        if file not in self._adapters:
            said = inspect_adapter(file).record.get("base_sha256")
            if said and said != base_fingerprint(self.folder):
                raise UserError(
                    f"{file} was trained on another base than {self.folder} (their fingerprints differ); "
                    "compare models of one base"
                )
            self._adapters[file] = read_adapter(file, self._like)
        return self._adapters[file]

    def base(self) -> Model:
        return self._base

    def from_path(self, path: Path, name: str, role: str) -> Model:
        label = name if role in ("student", "teacher") else path.name
        if path.resolve() == self.folder.resolve():
            return replace(self.base(), name=name, label=label, role=role)
        if _is_pipeline(path):
            return Model(name, label, role, portable(str(path)), sha256_of(path), pipeline=path)
        file = adapter_file(path)
        return Model(name, label, role, portable(str(path)), sha256_of(file), self.adapter(file))

    def named(self, weights: Mapping[str, float]) -> str:
        """`blend:...` with a weight for each teacher by its name."""
        for name in weights:
            if name not in self.teachers:
                raise UserError(f"blend weights name {name!r}, which is no teacher{nearest(name, self.teachers)}")
        missing = [name for name in self.teachers if name not in weights]
        if missing:
            raise UserError(f"blend weights leave out {', '.join(missing)}; give every teacher one, 0 for none of it")
        return "blend:" + "/".join(f"{weights[name]!r}" for name in self.teachers)

    def teacher(self, name: str) -> Model:
        teacher = self.teachers[name]
        if teacher.adapter == "base":
            return replace(
                self.base(), name=name, label=f"{name} (base)", role="teacher", capability=teacher.capability
            )
        model = self.from_path(Path(teacher.adapter), name, "teacher")
        if teacher.scale != 1.0 and model.adapter is not None:
            strong = scaled(model.adapter, teacher.scale)
            model = replace(model, adapter=strong, sha256=strong.sha256, label=f"{name} x{teacher.scale:g}")
        return replace(model, capability=teacher.capability)

    def blend(self, word: str, method: str = "linear") -> Model:
        weights = _weights_of(word, len(self.teachers), method)
        parts = [(self.teacher(name).adapter, w) for name, w in zip(self.teachers, weights)]
        held = [(adapter, w) for adapter, w in parts if adapter is not None and w != 0]
        label = "blend" if word == "blend" else "blend " + "/".join(f"{w:.2g}" for w in weights)
        label = label if method == "linear" else label.replace("blend", method, 1)
        if not held:
            base = replace(self.base(), name=_slug(label), label=label, role="blend")
            return replace(base, weights=weights, method=method)
        merged = blend([adapter for adapter, _ in held], [w for _, w in held], method=method)
        prefix = "" if method == "linear" else f"{method}: "
        return Model(
            _slug(label),
            label,
            "blend",
            prefix + "+".join(f"{w:.3g}*{n}" for n, w in zip(self.teachers, weights)),
            merged.sha256,
            merged,
            weights=weights,
            method=method,
        )

    def model(self, word: str, method: str = "linear") -> Model:
        if word == "base":
            return self.base()
        if word in self.teachers:
            return self.teacher(word)
        if word == "blend" or word.startswith("blend:"):
            return self.blend(word, method)
        if word in SHIPPED or Path(word).expanduser().exists():
            path = _path_of(word, "the model")
            return self.from_path(path, _slug(word if word in SHIPPED else path.stem), "other")
        known = ("base", "teachers", "blend", *self.teachers, *SHIPPED)
        raise UserError(
            f"--against names {word!r}, which is neither a model nor an existing path"
            f"{nearest(word, dict.fromkeys(known))}"
        )


def line_up(
    student: str | Path,
    against: Sequence[str] = ("base", "teachers", "blend"),
    blend_weights: Sequence[float] | Mapping[str, float] = (),
    recipe: Recipe | None = None,
    blend_methods: Sequence[str] = ("linear",),
) -> Lineup:
    """The models that the names mean.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name. `against`:
    `base`, a teacher of the student's recipe by name, `teachers` (all of them), `blend`, `blend:0.3`, a shipped
    name, or a path. `blend_weights` are further blends, by the share of the first of two teachers; by teacher's
    name they are the weights of `blend` itself. Every blend is made by each of `blend_methods`, as `blend` makes
    it. Without a recipe beside the student, the default recipe says what the base and the teachers are.
    """
    builder = _Builder(student, recipe)
    for method in blend_methods:
        if method not in METHODS:
            raise UserError(f"there is no blend method {method!r}{nearest(method, METHODS)}")
    words: list[str] = []
    for word in (w.strip() for w in against):
        words += list(builder.teachers) if word == "teachers" else [word] if word else []
    if isinstance(blend_weights, Mapping):
        if blend_weights:
            named = builder.named(blend_weights)
            words = [named if word == "blend" else word for word in words]
            words += [] if named in words else [named]
    else:
        if blend_weights and len(builder.teachers) != 2:
            raise UserError(
                f"blend weights share out two teachers, and this recipe has {len(builder.teachers)}; "
                "name each blend instead, for example --against blend:0.2/0.3/0.5"
            )
        words += [f"blend:{weight:g}" for weight in blend_weights]
    found: dict[str, Model] = {}
    for word in dict.fromkeys(words):
        for method in blend_methods if word.partition(":")[0] == "blend" else ("",):
            model = builder.model(word, method)
            same = (model.role, model.weights, model.method)
            if model.role != "blend" or same not in [(m.role, m.weights, m.method) for m in found.values()]:
                found[_free(model.name, found)] = model
    order = {"base": 0, "teacher": 1, "other": 2, "blend": 3}
    models = [replace(m, name=name) for name, m in sorted(found.items(), key=lambda pair: order[pair[1].role])]
    known = str(student) in SHIPPED or builder.path.parent.name in ("", ".")
    label = str(student) if known else builder.path.name
    mine = builder.from_path(builder.path, _free("student", found), "student")
    mine = replace(mine, label="student" if label == "student" else f"student: {label}"[:40])
    return Lineup(builder.base(), builder.folder, (*models, mine), dict(builder.recipe.call))


def _free(name: str, taken: Any) -> str:
    names = (name, *(f"{name}-{n}" for n in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in RESERVED)


class Stage:
    """The loaded pipeline with every LoRA of a lineup on one backbone; `acting(model)` gives its velocity field."""

    def __init__(self, lineup: Lineup, device: str) -> None:
        from danceopd.backbone import Backbone
        from danceopd.base_model import load_base, stored_dtype
        from danceopd.pipelines import family_of

        dtype = torch.float32 if device == "cpu" else stored_dtype(lineup.folder)
        self.pipe = load_base(lineup.folder, dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.family, self.device, self._folder = family_of(self.pipe), device, lineup.folder
        self.backbone = Backbone(self.pipe.transformer, self.family)
        for model in lineup.models:
            if model.adapter is not None:
                self.backbone.add_adapter(model.name, model.adapter)
        self.large = sum(p.numel() for p in self.pipe.transformer.parameters()) > LARGE

    @torch.no_grad()
    def round_trip(self, images: list[Any], batch: int = 64) -> list[Any]:
        """Pictures through the autoencoder and back: what is lost before any model draws."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        found: list[Any] = []
        for at in range(0, len(images), batch):
            pixels = processor.preprocess(images[at : at + batch]).to(self.device, vae.dtype)
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
            found += processor.postprocess(decoded, output_type="pil")
        return found

    @contextmanager
    def acting(self, model: Model) -> Iterator[Callable]:
        """Inside, the yielded field is the model's velocity, without gradients."""
        backbone, how = self.backbone, self.backbone.acting_as(None)
        if model.pipeline is not None:
            backbone = self._fused(model)
            how = backbone.acting_as(None)
        elif model.adapter is not None:
            how = backbone.acting_as(model.name) if self.large else backbone.merged(model.name)
        with torch.no_grad(), how:
            yield backbone.velocity

    def _fused(self, model: Model) -> Any:
        """A backbone of a fused pipeline's own transformer."""
        from danceopd.backbone import Backbone

        assert model.pipeline is not None
        for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
            ours, theirs = self._folder / part, model.pipeline / part
            if ours.is_dir() and weights_of(ours) != weights_of(theirs):
                raise UserError(
                    f"{model.pipeline} has another {part} than the base {self._folder}, so the two cannot "
                    "share prompts and pictures; bench it as a base of its own"
                )
        kind = type(self.pipe.transformer)
        transformer = kind.from_pretrained(model.pipeline / "transformer", torch_dtype=self.pipe.transformer.dtype)
        return Backbone(transformer.to(self.device), self.family)


def weights_of(part: Path) -> list[str]:
    """Hashes of the weights of one component of a pipeline."""
    return [sha256_of(file) for file in sorted(part.rglob("*.safetensors"))] if part.is_dir() else []
