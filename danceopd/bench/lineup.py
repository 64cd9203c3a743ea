"""Which models a bench compares: the student, the base, the recipe's teachers, LoRA blends, and any model by path.

Names go in, a `Lineup` comes out. No weight of the base is loaded for it, so a misspelt name costs no time. Every LoRA
must belong to the base; a full model has its own transformer and must share the base's text encoder and autoencoder,
since prompts are encoded once for all models. Two names of the same weights are sampled once.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from danceopd.adapters.blend import NEEDS_INPUTS, blend, scaled
from danceopd.adapters.blending.methods import Method, method_of
from danceopd.adapters.header import adapter_file, inspect_adapter, is_checkpoint
from danceopd.adapters.read import read_adapter
from danceopd.common.files import sha256
from danceopd.common.messages import did_you_mean
from danceopd.common.parse import read_json
from danceopd.common.shipped import SHIPPED, portable, shipped
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprints, base_folder, empty_transformer
from danceopd.models.checkpoint import open_checkpoint
from danceopd.models.lora import Adapter
from danceopd.plugins import name_of
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.recorded import recorded_recipe
from danceopd.run.directory import TEACHERS

RESERVED = ("source", "target", "mask")
"""Folders below images/ that belong to no model."""
AGAINST = ("base", "teachers", "blend")
"""What a student is compared with by default."""
_log = logging.getLogger("danceopd")


@dataclass(frozen=True)
class Model:
    """One model of the comparison. Without `adapter`, `checkpoint` and `image_folder` it is the base itself."""

    name: str  # unique; also the name of its folder below images/
    label: str  # as reports print it
    role: str  # base, teacher, blend, student or other
    path: str  # where it comes from; a shipped checkpoint by its name
    sha256: str
    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    checkpoint: Path | None = None  # of a full model: a pipeline, a transformer's folder or a single file
    weights: tuple[float, ...] = ()  # of a blend, in the order of the recipe's teachers
    method: str = ""  # of a blend
    capability: str | None = None  # of a teacher
    guidance: float | None = None  # classifier-free guidance scale of the recipe's teacher; None: no guidance
    negative: str | None = None  # its negative prompt; None: the family's own
    image_folder: Path | None = None  # of images made elsewhere, instead of weights

    def guided(self, capability: str) -> bool:
        """Whether it is sampled with guidance: a teacher, in its own capability only."""
        return self.guidance is not None and self.capability in (None, capability)

    def sampling_key(self, capability: str) -> tuple:
        """Equal for models that make the same images."""
        guidance = (self.guidance, self.negative) if self.guided(capability) else None
        return self.sha256, self.checkpoint, guidance, self.image_folder


@dataclass(frozen=True)
class Lineup:
    """The base, and the models in the order of the tables, the student last.

    `base` and `folder` are None when there are only folders of images (`add_image_folders`).
    """

    base: Model | None
    folder: Path | None  # of the base's weights
    models: tuple[Model, ...]
    call: dict[str, float]  # pipeline arguments of the recipe, which replace the base's own
    family: str | None = None  # of the recipe; None: by the base's pipeline
    editing_base: str | None = None  # of the recipe: a pipeline with what the base lacks for editing

    @property
    def student(self) -> Model:
        """The model under test."""
        return self.models[-1]

    def first_of(self, capability: str) -> dict[str, str]:
        """Model name -> the first model that makes the same images, and so shares its own."""
        first = {m.sampling_key(capability): m.name for m in reversed(self.models)}
        return {m.name: first[m.sampling_key(capability)] for m in self.models}

    def teachers_for(self, capability: str) -> list[str]:
        """Names of all teachers, those of the capability first (they win a tie)."""
        found = [m for m in self.models if m.role == "teacher"]
        return [m.name for m in sorted(found, key=lambda m: m.capability != capability)]

    def names(self, role: str) -> list[str]:
        """Names of the models of a role."""
        return [m.name for m in self.models if m.role == role]


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes; of a folder, over the names and hashes of its weights and configurations."""
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
    """The recipe in a student's folder; else the default one, with the base that its file names."""
    folder = path if path.is_dir() else path.parent
    if (folder / "recipe.yaml").is_file():
        return Recipe(f"{folder / 'recipe.yaml'}", **recorded_recipe(folder))
    base = None if _is_pipeline(path) else inspect_adapter(path).record.get("base")
    return Recipe(base=base) if base else Recipe()


def _path_of(name: str, what: str) -> Path:
    """The path of a shipped name, or an existing path; UserError otherwise."""
    if name in SHIPPED:
        return shipped(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            f"{what} {name!r} does not exist (looked at {path.absolute()}); give a run folder, a LoRA's "
            f"folder or file, a fused pipeline, or one of {', '.join(SHIPPED)}"
        )
    return path


def _blend_weights(word: str, teachers: int, method: str = "linear") -> tuple[float, ...]:
    """The weights of `blend`, `blend:0.3` (the first of two teachers) or `blend:0.3/0.3/0.4`."""
    _, _, text = word.partition(":")
    if not text:
        return tuple(method_of(method).weights(teachers))
    try:
        weights = tuple(float(part) for part in text.split("/"))
    except ValueError:
        weights = ()
    if len(weights) == 1 and teachers == 2:
        weights = (weights[0], round(1 - weights[0], 9))
    if len(weights) != teachers or not all(-10 <= w <= 10 for w in weights):
        raise UserError(
            f"{word!r} does not give each of the {teachers} teachers a weight; write "
            f"blend:{'/'.join(['%.2f' % (1 / teachers)] * teachers)}"
            + (", or blend:0.5 for the weight of the first" if teachers == 2 else "")
        )
    return weights


class _Builder:
    """Makes the models that names mean, with one recipe."""

    def __init__(self, student: str | Path, recipe: Recipe | None) -> None:
        self.path = _path_of(str(student), "the student")
        self.recipe, self._own = recipe or _recipe_of(self.path), recipe is None
        self.folder = base_folder(self.recipe.base)
        self.teachers = {t.name: t for t in self.recipe.teachers}
        self._like = empty_transformer(self.folder)
        self._adapters: dict[Path, Adapter] = {}
        self.base = Model("base", "base", "base", portable(self.recipe.base), sha256_of(self.folder))

    @property
    def full_models(self) -> list[str]:
        """Names of the teachers that are full models, not LoRAs."""
        adapters = {name: teacher.adapter for name, teacher in self.teachers.items()}
        return [name for name, path in adapters.items() if path != "base" and is_checkpoint(path)]

    def adapter(self, file: Path) -> Adapter:
        """The LoRA of a file; UserError if it does not belong to the base."""
        if file not in self._adapters:
            trained_on = inspect_adapter(file).record.get("base_sha256")
            known = base_fingerprints(self.folder)
            if trained_on and known and trained_on not in known:
                raise UserError(
                    f"{file} was trained on another base than {self.folder} (their fingerprints differ); "
                    "give models of one base"
                )
            self._adapters[file] = read_adapter(file, self._like)
        return self._adapters[file]

    def from_path(self, path: Path, name: str, role: str) -> Model:
        """The model at a path: the base, a full model or a LoRA."""
        label = name if role in ("student", "teacher") else path.name
        if path.resolve() == self.folder.resolve():
            return replace(self.base, name=name, label=label, role=role)
        if is_checkpoint(path):
            return Model(name, label, role, portable(str(path)), sha256_of(path), checkpoint=path)
        file = adapter_file(path)
        return Model(name, label, role, portable(str(path)), sha256_of(file), self.adapter(file))

    def blend_name(self, weights: Mapping[str, float]) -> str:
        """`blend:...` with the weights that are given by teacher name."""
        for name in weights:
            if name not in self.teachers:
                raise UserError(f"--blend-weights: {name!r} is no teacher{did_you_mean(name, self.teachers)}")
        missing = [name for name in self.teachers if name not in weights]
        if missing:
            raise UserError(f"--blend-weights lacks {', '.join(missing)}; give every teacher a weight, 0 to omit it")
        return "blend:" + "/".join(f"{weights[name]!r}" for name in self.teachers)

    def teacher(self, name: str) -> Model:
        """A teacher of the recipe, at its scale and with its guidance."""
        teacher = self.teachers[name]
        if teacher.adapter == "base":
            model = replace(self.base, name=name, label=f"{name} (base)", role="teacher")
        else:
            model = self.from_path(Path(teacher.adapter), name, "teacher")
            self._refuse_other(teacher, model)
        if teacher.scale != 1.0 and model.adapter is not None:
            at_scale = scaled(model.adapter, teacher.scale)
            model = replace(model, adapter=at_scale, sha256=at_scale.sha256, label=f"{name} x{teacher.scale:g}")
        if teacher.field is not None:
            _log.warning("teacher %s is sampled as its weights are, without its field %s", name, teacher.field)
        return replace(model, guidance=teacher.guidance, negative=teacher.negative, capability=teacher.capability)

    def _refuse_other(self, teacher: Teacher, model: Model) -> None:
        """UserError for a teacher that is not the one that a run recorded, as where a project was moved in part."""
        if not self._own:
            return
        record = (self.path if self.path.is_dir() else self.path.parent) / TEACHERS
        learnt = read_json(record, "the record of the teachers").get("teachers", {}) if record.is_file() else {}
        known = (learnt.get(teacher.name) or {}).get("sha256")
        if not known:
            return
        mine = None if model.adapter is None else model.adapter.sha256
        if model.checkpoint is not None:
            mine = open_checkpoint(model.checkpoint, open_checkpoint(self.folder)).sha256
        if mine and known != mine:
            raise UserError(
                f"teacher {teacher.name!r} in {teacher.adapter} is not what the student in {self.path} learnt from "
                f"(sha256 {str(known)[:12]} then, {mine[:12]} now); put the old weights back"
            )

    def blend(self, word: str, method: str = "linear") -> Model:
        """The teachers' LoRAs merged in weight space, by one method."""
        weights = _blend_weights(word, len(self.teachers), method)
        if self.full_models:
            raise UserError(
                f"teacher {self.full_models[0]!r} is a full model, which has no LoRA to blend; extract one with "
                "`danceopd extract`, or leave blend out of --against"
            )
        parts = [(self.teacher(name).adapter, w) for name, w in zip(self.teachers, weights)]
        kept = [(adapter, w) for adapter, w in parts if adapter is not None and w != 0]
        label = "blend" if word == "blend" else "blend " + "/".join(f"{w:.2g}" for w in weights)
        label = label if method == "linear" else label.replace("blend", method, 1)
        if not kept:
            base = replace(self.base, name=_slug(label), label=label, role="blend")
            return replace(base, weights=weights, method=method)
        merged = blend([adapter for adapter, _ in kept], [w for _, w in kept], method=method)
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
        """The model of one word of --against."""
        if word == "base":
            return self.base
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
            f"{did_you_mean(word, dict.fromkeys(known))}"
        )


def build_lineup(
    student: str | Path,
    against: Sequence[str] | None = None,
    blend_weights: Sequence[float] | Mapping[str, float] = (),
    recipe: Recipe | None = None,
    blend_methods: Sequence[str | Method] = ("linear",),
) -> Lineup:
    """The lineup of a student and of the models that it is compared with.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name. `against`: `base`,
    `teachers` (all of the recipe), one teacher's name, `blend`, `blend:0.3`, a shipped name, or a path; None means
    `AGAINST`, without the blend if a teacher is a full model. `blend_weights`: a list: for two teachers, several
    weights w of the first (the second gets 1 - w); a mapping: one weight for each teacher. Every blend is made by each
    of `blend_methods`, as `danceopd blend` does. Without a recipe in the student's folder, the default recipe names the
    base and the teachers. UserError for a name or path that is nothing.
    """
    builder = _Builder(student, recipe)
    methods = [name_of("blend method", method) for method in blend_methods]
    for method in methods:
        if method_of(method).regress is not None:
            raise UserError(f"blend method {method} {NEEDS_INPUTS}")
    if against is None:
        against = [word for word in AGAINST if word != "blend" or not builder.full_models]
        if len(against) < len(AGAINST):
            _log.warning("no blend is compared: teacher %s is a full model, not a LoRA", builder.full_models[0])
    words: list[str] = []
    for word in (w.strip() for w in against):
        words += list(builder.teachers) if word == "teachers" else [word] if word else []
    if isinstance(blend_weights, Mapping):
        if blend_weights:
            name = builder.blend_name(blend_weights)
            words = [name if word == "blend" else word for word in words]
            words += [] if name in words else [name]
    else:
        if blend_weights and len(builder.teachers) != 2:
            raise UserError(
                f"single blend weights need two teachers, and this recipe has {len(builder.teachers)}; "
                "name each blend instead, for example --against blend:0.2/0.3/0.5"
            )
        words += [f"blend:{weight:g}" for weight in blend_weights]
    found: dict[str, Model] = {}
    for word in dict.fromkeys(words):
        for method in methods if word.partition(":")[0] == "blend" else ("",):
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
    recipe = builder.recipe
    if recipe.fast is not None:
        _log.warning(
            "base, teachers and blends draw in the student's %d steps, without fast.adapter; for a fair comparison "
            "bench a LoRA blended with it, by its path in --against", recipe.fast.steps,
        )  # fmt: skip
    return Lineup(
        builder.base, builder.folder, (*models, mine), dict(recipe.call), recipe.family, recipe.editing_base
    )


def add_image_folders(folders: Mapping[str, Path], lineup: Lineup | None = None) -> Lineup:
    """A lineup of folders of images made elsewhere, by model name; with `lineup`, they are added to its models.

    On their own, `base` is the base, and the student is `student`, else the first that is not `base`. UserError for a
    name that cannot be a folder's or is taken, and for a missing folder.
    """
    taken = (*RESERVED, *(m.name for m in lineup.models)) if lineup else RESERVED
    found = []
    for name, folder in folders.items():
        if name != _slug(name):
            raise UserError(f"--images names {name!r}; use letters, digits, - and _, such as {_slug(name)}")
        if name in taken:
            raise UserError(f"--images names {name!r}, which is taken; give these images another name")
        if not folder.is_dir():
            raise UserError(f"--images {name}: there is no folder {folder.absolute()}; give the folder of its images")
        role = "base" if name == "base" and lineup is None else "other"
        found.append(Model(name, name, role, str(folder), "", image_folder=folder))
    if lineup is not None:
        return replace(lineup, models=(*lineup.models[:-1], *found, lineup.student))
    mine = next((m for m in found if m.name == "student"), next((m for m in found if m.role != "base"), found[0]))
    others = sorted((m for m in found if m is not mine), key=lambda m: m.role != "base")
    return Lineup(None, None, (*others, replace(mine, role="student")), {})


def _free(name: str, taken: Any) -> str:
    names = (name, *(f"{name}-{n}" for n in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in RESERVED)
