"""`open_checkpoint`: a whole transformer on disk, opened by its headers; its tensors are read one at a time.

A path may be a pipeline folder, a transformer folder, or a single safetensors file in diffusers' names or in the
original model's (ComfyUI), which diffusers' own single-file converter renames. Tensors are memory-mapped. Two
checkpoints are compared by class, configuration, names and shapes before a weight is read.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.common.messages import few
from danceopd.common.parse import read_json
from danceopd.common.safetensors import read_header
from danceopd.errors import UserError
from danceopd.models.base import (
    base_folder,
    empty_model,
    file_sha256,
    transformer_config,
    transformer_fingerprint,
    transformer_folders,
)
from danceopd.pipelines.two_transformers import PREFIX, SECOND, of_second

_log = logging.getLogger("danceopd")
_FLOATS = ("F64", "F32", "F16", "BF16")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
_OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "conditioner.", "cond_stage_model.")
_STEM = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A transformer's weights on disk.

    `config` is the diffusers configuration (None for a single file), `scheduler` that of its pipeline's scheduler (None
    without one), `shapes` the tensors' shapes by diffusers name.
    """

    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor] | Mapping[str, Path]  # by diffusers name: a renamed view, or the file that holds it

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, a view of the file in memory where possible: never write into it.

        KeyError for a name that is not there, UserError when the file is damaged.
        """
        found = self.tensors[name]
        if isinstance(found, Tensor):
            return found
        from safetensors import SafetensorError

        try:
            return self._opened(found).get_tensor(name.removeprefix(PREFIX))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{found} cannot be read ({error}); download or copy it again") from None

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, and of the configuration where there is one, as `base_fingerprint` does."""
        return file_sha256(self.files[0]) if self.config is None else transformer_fingerprint(self.files[0].parent)

    def empty(self) -> nn.Module:
        """The model on the meta device; UserError for a single file, which does not say its architecture."""
        if self.config is None:
            raise UserError(f"{self.path} does not say which architecture it is; give its pipeline's folder")
        return empty_model(self.config, self.path)

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def _opened(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            self._handles[file] = safe_open(str(file), framework="pt")
        return self._handles[file]


def open_checkpoint(path: str | Path, like: Checkpoint | None = None) -> Checkpoint:
    """Open a pipeline folder, a transformer folder, a safetensors file, or a pipeline's name on the hub.

    `like` is a checkpoint of the expected architecture: a single file needs it, and what is opened must match it
    tensor for tensor. UserError for anything else, and for weights that are quantised or pickled.
    """
    place = Path(path).expanduser()
    if like is not None and of_second(like.shapes):
        raise UserError(
            f"{like.path} has two transformers, and whole models of two are not compared; extract a LoRA of each "
            "(`danceopd extract BASE/transformer TUNED/transformer`, and of transformer_2), and write both into one "
            "file: `danceopd export FIRST --second SECOND --base BASE -o OUT`"
        )
    if place.is_file():
        return _single(place, like)
    if not (place / "config.json").is_file():
        place = base_folder(str(path))
        if not (place / "transformer" / "config.json").is_file():
            raise UserError(f"{place} is a pipeline without a transformer; danceopd works on transformers")
    pipeline = place if (place / "model_index.json").is_file() else place.parent
    folder = place if (place / "config.json").is_file() else place / "transformer"
    config = transformer_config(folder, whole=True)
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    folders = transformer_folders(place) if folder != place else [folder]
    files = tuple(file for each in folders for file in _weights(each))
    for file in files:
        for name, shape in _header(file).items():
            name = PREFIX + name if file.parent.name == SECOND and len(folders) > 1 else name
            if name in found:
                raise UserError(f"{folder} holds {name} twice, in {found[name].name} and {file.name}; keep one copy")
            found[name], shapes[name] = file, shape
    scheduler = _scheduler(pipeline) if (pipeline / "model_index.json").is_file() else None
    opened = Checkpoint(place, files, config, scheduler, shapes, found)
    if like is not None:
        check_same(like, opened)
    return opened


def check_stored(folder: Path, transformer: nn.Module) -> None:
    """UserError for a pipeline folder whose `transformer` (of its configuration, on the meta device) is stored
    quantised, or without some of its tensors, which diffusers would fill with random numbers."""
    place = folder / "transformer"
    stored, wanted = open_checkpoint(folder).shapes, transformer.state_dict()
    missing = wanted.keys() - stored.keys()
    if missing:
        raise UserError(f"{place} lacks {len(missing)} of its {len(wanted)} tensors ({few(missing)}); fetch it again")
    odd = [name for name, tensor in wanted.items() if tuple(tensor.shape) != stored[name]]
    if odd:
        raise UserError(
            f"{place} does not fit its config.json: {odd[0]} is stored as {stored[odd[0]]} and the configuration makes "
            f"it {tuple(wanted[odd[0]].shape)}; fetch it again"
        )


def check_same(base: Checkpoint, other: Checkpoint) -> None:
    """UserError unless both have the same class, configuration, tensor names and shapes."""
    if base.config is not None and other.config is not None:
        mine, theirs = _filled(base.config), _filled(other.config)
        odd = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if odd:
            key = "_class_name" if "_class_name" in odd else odd[0]
            raise UserError(
                f"{other.path} is another architecture than {base.path}: {key.strip('_')} is {theirs.get(key)} there "
                f"and {mine.get(key)} in the base; use a model that was trained from this base"
            )
    missing, extra = base.shapes.keys() - other.shapes.keys(), other.shapes.keys() - base.shapes.keys()
    if missing or extra:
        kinds = [f"{len(n)} {what} ({few(n)})" for n, what in ((missing, "missing"), (extra, "extra")) if n]
        raise UserError(
            f"{other.path} does not have the {len(base.shapes)} tensors of {base.path}: {'; '.join(kinds)}; "
            "use a whole model that was trained from this base"
        )
    wrong = [name for name, shape in base.shapes.items() if other.shapes[name] != shape]
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{other.path} has another size than {base.path}: {name} is {other.shapes[name]} there and "
            f"{base.shapes[name]} in the base ({len(wrong)} of {len(base.shapes)} tensors differ: {few(wrong)}); "
            "use a model that was trained from this base"
        )


def scheduler_difference(base: Checkpoint, other: Checkpoint) -> str | None:
    """The first setting in which two pipelines' schedulers differ ("shift is 3.0 there and 1.0 in the base"), or None.

    Missing settings count as diffusers' defaults. None, too, when one of the two has no scheduler.
    """
    if base.scheduler is None or other.scheduler is None:
        return None
    mine, theirs = _filled(base.scheduler), _filled(other.scheduler)
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            return f"{key.strip('_')} is {theirs.get(key)} there and {mine.get(key)} in the base"
    return None


def component_difference(base: Checkpoint, other: Checkpoint) -> str | None:
    """The name of another component (a text encoder, the autoencoder) whose weights differ in two pipelines, or None.

    Weights stored in another dtype are not compared; two links to one file are not read.
    """
    if base.scheduler is None or other.scheduler is None:  # no pipeline folder
        return None
    ours, theirs = (_pipeline(c).glob("*/*.safetensors") for c in (base, other))
    mine = {file.relative_to(_pipeline(base)): file for file in ours if file.parent not in _parents(base)}
    for file in sorted(theirs):
        same = mine.get(file.relative_to(_pipeline(other)))
        if same is None or file.parent in _parents(other) or file.resolve() == same.resolve():
            continue
        a, b = read_header(same), read_header(file)
        if a.dtypes == b.dtypes and (a.shapes != b.shapes or file_sha256(same) != file_sha256(file)):
            return file.parent.name
    return None


def _parents(checkpoint: Checkpoint) -> set[Path]:
    return {file.parent for file in checkpoint.files}


def _pipeline(checkpoint: Checkpoint) -> Path:
    return checkpoint.files[0].parent.parent


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration with its class's defaults and without paths and versions, to be compared."""
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(cls.__init__).parameters.values() if cls is not None else ()
    filled = {p.name: p.default for p in parameters if p.default is not p.empty}
    filled |= {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
    return json.loads(json.dumps(filled, default=str))


def _scheduler(pipeline: Path) -> dict[str, Any] | None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    return read_json(file, "the scheduler's configuration", mend="fetch the model again")


def _weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that diffusers would load; UserError when it is not clear which."""
    index = folder / f"{_STEM}.index.json"
    if index.is_file():
        held = read_json(index, "the index", mend="fetch the model again").get("weight_map")
        if not isinstance(held, dict) or not all(isinstance(n, str) and Path(n).name == n for n in held.values()):
            raise UserError(f"the index {index} does not map tensors to files beside it; fetch the model again")
        names = sorted(set(held.values()))
        gone = [name for name in names if not (folder / name).is_file()]
        if gone:
            raise UserError(f"{folder} lacks {few(gone)} of its {len(names)} weight files; fetch the model again")
        return tuple(folder / name for name in names)
    files = [folder / _STEM] if (folder / _STEM).is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = "several safetensors files without an index" if files else "no safetensors weights"
        raise UserError(f"{folder} holds {what}; save the model with save_pretrained")
    return (files[0],)


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one file; UserError for a damaged file and for quantised weights."""
    header = read_header(file)
    if not header.shapes:
        raise UserError(f"{file} holds no tensors; download or copy it again")
    odd = [dtype for dtype in header.dtypes if dtype not in _FLOATS]
    if odd:
        raise UserError(f"{file} holds quantised weights ({', '.join(odd)}); give the model in bf16, fp16 or fp32")
    return header.shapes


def _single(file: Path, like: Checkpoint | None) -> Checkpoint:
    """A single safetensors file of the architecture of `like`, its tensors by diffusers name."""
    shapes = _header(file)
    if like is None or like.config is None:
        raise UserError(
            f"{file} is a single file, which does not say its architecture; give the other model as a folder that "
            "save_pretrained wrote"
        )
    held = {name: name for name in shapes}
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in shapes)), "")
    if prefix:
        held = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
        left = [name for name in shapes if not name.startswith((prefix, *_OTHER_PARTS))]
        if left:
            raise UserError(f"{file} holds {len(left)} tensors outside {prefix} ({few(left)}); give the transformer")
        if len(held) < len(shapes):
            _log.warning("%s also holds a text encoder or an autoencoder; only its transformer is used", file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            views: dict[str, Tensor] = {name: opened.get_tensor(key) for name, key in held.items()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download or copy it again") from None
    if views.keys() != like.shapes.keys():
        views = _converted(file, views, like.config)
    found = Checkpoint(file, (file,), None, None, {name: tuple(t.shape) for name, t in views.items()}, views)
    check_same(like, found)
    return found


def _converted(file: Path, views: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Original names -> diffusers names, by diffusers' converter for this class; UserError when there is none.

    Splits of a fused tensor stay views of the file; only what the converter rearranges is copied.
    """
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = str(config["_class_name"])
    ancestry = [cls.__name__ for cls in getattr(diffusers, name).__mro__]
    known = next((SINGLE_FILE_LOADABLE_CLASSES[c] for c in ancestry if c in SINGLE_FILE_LOADABLE_CLASSES), None)
    if known is None:
        raise UserError(
            f"{file} is not named as diffusers names a {name}, and diffusers has no converter for it; "
            "give a folder that save_pretrained wrote"
        )
    try:
        with torch.no_grad():
            return dict(known["checkpoint_mapping_fn"](config=dict(config), checkpoint=dict(views)))
    except Exception as error:  # each converter fails in its own way on a name it does not know
        raise UserError(
            f"{file} is neither in diffusers' names nor in those of the original {name} "
            f"({type(error).__name__}: {error}); use a whole model that was trained from this base"
        ) from None
