"""Which models a bench compares: the student, the base, its recipe's teachers, a naive blend, anything by path.

Names become a `Lineup` without any weight of the base being loaded, so misspelt names cost nothing. All LoRAs
ride on ONE backbone (`stage`); a whole model brings its own transformer and must share the base's text encoder and
autoencoder, since prompts are encoded once for everybody. Two names for the same weights are sampled once.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from danceopd.base_model import base_fingerprint, base_folder, empty_transformer
from danceopd.blend import METHODS, blend, scaled
from danceopd.checkpoint import is_checkpoint
from danceopd.disk import sha256
from danceopd.errors import UserError
from danceopd.lora import Adapter, read_adapter
from danceopd.lora_file import adapter_file, inspect_adapter
from danceopd.recipe import Recipe
from danceopd.sentences import nearest
from danceopd.shipped import SHIPPED, portable, shipped

RESERVED = ("source", "target", "mask")
"""Folders of a bench that are no models."""
AGAINST = ("base", "teachers", "blend")
"""What a student is compared with when nothing is named."""
_log = logging.getLogger("danceopd")


@dataclass(frozen=True)
class Model:
    """One row of the table. `adapter` None with `whole` None is the bare base."""

    name: str  # of its folder and in every row; unique
    label: str
    role: str  # base, teacher, blend, student or other
    path: str  # where it comes from; a shipped checkpoint by its name
    sha256: str
    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    whole: Path | None = None  # a pipeline's, a transformer's folder or a single file, instead of an adapter
    weights: tuple[float, ...] = ()  # of a blend, in the order of the recipe's teachers
    method: str = ""  # of a blend
    capability: str | None = None  # of a teacher
    guidance: float | None = None  # classifier-free, as its recipe's teacher is asked; None: without
    negative: str | None = None  # its prompt to get away from; None: the family's own
    pictures: Path | None = None  # a folder of pictures made elsewhere, instead of weights

    def guided(self, capability: str) -> bool:
        """Whether it is asked with guidance: a teacher in its own capability only."""
        return self.guidance is not None and self.capability in (None, capability)

    def asked(self, capability: str) -> tuple:
        """Equal for models that answer alike."""
        guidance = (self.guidance, self.negative) if self.guided(capability) else None
        return self.sha256, self.whole, guidance, self.pictures


@dataclass(frozen=True)
class Lineup:
    """The base everything rides on, and the models in the order of the table, the student last.

    Without a model that draws (`pictures_of`) there is no base and no folder.
    """

    base: Model | None
    folder: Path | None  # of the base
    models: tuple[Model, ...]
    call: dict[str, float]  # the recipe's, over the base's own
    family: str | None = None  # the recipe's; None: by the base's pipeline
    editing_base: str | None = None  # what the base's editing pipeline may lack

    @property
    def student(self) -> Model:
        """The model under test."""
        return self.models[-1]

    def drawn_by(self, capability: str) -> dict[str, str]:
        """Each model's name -> the first model that answers alike, whose pictures are its own too."""
        first = {m.asked(capability): m.name for m in reversed(self.models)}
        return {m.name: first[m.asked(capability)] for m in self.models}

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

    @property
    def whole(self) -> list[str]:
        """Names of the teachers that are whole models."""
        adapters = {name: teacher.adapter for name, teacher in self.teachers.items()}
        return [name for name, path in adapters.items() if path != "base" and is_checkpoint(path)]

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
        if is_checkpoint(path):
            return Model(name, label, role, portable(str(path)), sha256_of(path), whole=path)
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
            model = replace(self.base(), name=name, label=f"{name} (base)", role="teacher")
        else:
            model = self.from_path(Path(teacher.adapter), name, "teacher")
        if teacher.scale != 1.0 and model.adapter is not None:
            strong = scaled(model.adapter, teacher.scale)
            model = replace(model, adapter=strong, sha256=strong.sha256, label=f"{name} x{teacher.scale:g}")
        return replace(model, guidance=teacher.guidance, negative=teacher.negative, capability=teacher.capability)

    def blend(self, word: str, method: str = "linear") -> Model:
        weights = _weights_of(word, len(self.teachers), method)
        if self.whole:
            raise UserError(
                f"teacher {self.whole[0]!r} is a whole model, which has no LoRA to blend; take its low-rank difference "
                "with `danceopd extract`, or leave blend out of --against"
            )
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
    against: Sequence[str] | None = None,
    blend_weights: Sequence[float] | Mapping[str, float] = (),
    recipe: Recipe | None = None,
    blend_methods: Sequence[str] = ("linear",),
) -> Lineup:
    """The models that the names mean.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name. `against` (None:
    `AGAINST`, without the blend where a teacher is a whole model): `base`, a teacher of the student's recipe by
    name, `teachers` (all of them), `blend`, `blend:0.3`, a shipped name, or a path. `blend_weights` are further
    blends, by the share of the first of two teachers; by teacher's name they are the weights of `blend` itself. Every
    blend is made by each of `blend_methods`, as `blend` makes it. Without a recipe beside the student, the default
    recipe says what the base and the teachers are.
    """
    builder = _Builder(student, recipe)
    for method in blend_methods:
        if method not in METHODS:
            raise UserError(f"there is no blend method {method!r}{nearest(method, METHODS)}")
    if against is None:
        against = [word for word in AGAINST if word != "blend" or not builder.whole]
        if len(against) < len(AGAINST):
            _log.warning("no blend in the table: teacher %s is a whole model and no LoRA", builder.whole[0])
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
    recipe = builder.recipe
    return Lineup(
        builder.base(), builder.folder, (*models, mine), dict(recipe.call), recipe.family, recipe.editing_base
    )


def pictures_of(folders: Mapping[str, Path], lineup: Lineup | None = None) -> Lineup:
    """A line-up of folders of pictures made elsewhere, by name; with `lineup`, they join its models as others.

    Alone, `base` is the base, and the student is `student`, else the first that is not `base`. UserError for a name
    that is no folder's name or is taken, and for a folder that is not there.
    """
    taken = (*RESERVED, *(m.name for m in lineup.models)) if lineup else RESERVED
    found = []
    for name, folder in folders.items():
        if name != _slug(name):
            raise UserError(f"--images names {name!r}; use letters, digits, - and _, such as {_slug(name)}")
        if name in taken:
            raise UserError(f"--images names {name!r}, which is taken; give these pictures another name")
        if not folder.is_dir():
            raise UserError(f"--images {name}: there is no folder {folder.absolute()}; give the folder of its pictures")
        role = "base" if name == "base" and lineup is None else "other"
        found.append(Model(name, name, role, str(folder), "", pictures=folder))
    if lineup is not None:
        return replace(lineup, models=(*lineup.models[:-1], *found, lineup.student))
    mine = next((m for m in found if m.name == "student"), next((m for m in found if m.role != "base"), found[0]))
    others = sorted((m for m in found if m is not mine), key=lambda m: m.role != "base")
    return Lineup(None, None, (*others, replace(mine, role="student")), {})


def _free(name: str, taken: Any) -> str:
    names = (name, *(f"{name}-{n}" for n in range(2, 1000)))
    return next(n for n in names if n not in taken and n not in RESERVED)
