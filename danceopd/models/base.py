"""The base model on disk: find it or download it, load its pipeline, hash it, and read its settings.

A LoRA only fits the weights it was trained on, so a base has a fingerprint that every copy of its folder shares.
`empty_transformer` has shapes and no weights, which is enough to refuse a wrong LoRA at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danceopd.common.files import sha256
from danceopd.common.messages import shown
from danceopd.common.parse import read_json
from danceopd.common.safetensors import read_header
from danceopd.common.shipped import resolve
from danceopd.common.system import out_of_memory
from danceopd.errors import UserError
from danceopd.pipelines.family import Family
from danceopd.pipelines.registry import family_of
from danceopd.pipelines.two_transformers import SECOND, boundary, joined, joined_pipe
from danceopd.recipe.checks import CALL_MOST, check_call

_LARGEST = 2**24
"""No whole number in a transformer's configuration is larger, and none is negative."""
_COUNT = re.compile(r"num_.*(layers|blocks)|(layers|blocks)$")
_HASHES: dict[tuple[str, int, int], str] = {}  # (path, mtime in ns, size) -> sha256 of the file


@contextmanager
def quietly() -> Iterator[None]:
    """A context without the progress bars of diffusers and transformers; warnings stay."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    shown = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def base_folder(base: str | Path) -> Path:
    """The local folder of a base model: of a path, a shipped name, or `owner/name` on the hub (then downloaded).

    UserError when it is none of these, or not a diffusers pipeline.
    """
    place = resolve(base, "base model", hub=True)
    if not Path(place).exists():
        from diffusers import DiffusionPipeline

        try:
            with quietly():
                place = DiffusionPipeline.download(place)
        except Exception as error:  # the hub's client raises a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"base model {base} is not a folder here and could not be fetched from the hub ({reason[:120]}); check "
                "the name and the connection, or download it first and give its folder"
            ) from None
    folder = Path(place)
    if (folder / "modular_model_index.json").is_file():
        raise UserError(
            f"base model {folder} is a modular pipeline, which a merge does not load; record its conditions in Python "
            "(docs/bring-your-own-model.md)"
        )
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"base model {folder} is not a diffusers pipeline (it has no model_index.json); give a folder that "
            "DiffusionPipeline.save_pretrained wrote"
        )
    boundary(pipeline_index(folder), folder)
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        read_json(scheduler, "the scheduler's configuration", mend="fetch the model again")
    return folder


def pipeline_index(folder: str | Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline's folder; UserError when it is none."""
    return read_json(Path(folder) / "model_index.json", "the pipeline's index", mend="fetch the model again")


def load_base(folder: str | Path, dtype: torch.dtype | None = None, **components: Any) -> Any:
    """`DiffusionPipeline.from_pretrained(folder)` without progress bars; `dtype` None is the stock default (fp32).

    Of two transformers the first holds the second (`pipelines/two_transformers.py`). `components` replace the folder's
    own (`vae=None` leaves one out). UserError when it does not load.
    """
    from diffusers import DiffusionPipeline

    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        with quietly():
            return joined_pipe(DiffusionPipeline.from_pretrained(folder, **kwargs, **components))
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} needs a package that is not installed ({reason}); install it") from error
    except Exception as error:  # every damaged part fails in its own way
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the pipeline {folder} does not load ({reason}); fetch it again, or check that diffusers is new enough"
        ) from error


def empty_transformer(folder: str | Path) -> nn.Module:
    """The pipeline's transformer on the meta device, from its config alone: shapes without weights. It holds the second
    of two."""
    first, *rest = (empty_model(transformer_config(place), folder) for place in transformer_folders(folder))
    ratio = boundary(pipeline_index(folder), folder) if rest else None
    return first if ratio is None else joined(first, rest[0], ratio)


def transformer_folders(folder: str | Path) -> list[Path]:
    """Where a pipeline's folder has its transformer, or its two."""
    folder = Path(folder)
    two = (folder / "model_index.json").is_file() and boundary(pipeline_index(folder), folder) is not None
    return [folder / "transformer", *([folder / SECOND] if two else [])]


def empty_model(config: Mapping[str, Any], where: str | Path) -> nn.Module:
    """The model of a diffusers config on the meta device; `where` is what an error message names."""
    import diffusers

    model: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(model, type) and issubclass(model, diffusers.ModelMixin)
    if not known:
        raise UserError(
            f"{where} has a transformer of class {shown(config.get('_class_name'))}, which is no model that this "
            "diffusers knows; install a newer diffusers, or fetch the model again"
        )
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    for key, value in config.items():
        if any(not 0 <= number <= (1000 if _COUNT.search(key) else _LARGEST) for number in _whole(value)):
            raise UserError(
                f"the transformer's configuration in {where} says {key}: {shown(value)}, which no model has; fetch the "
                "model again"
            )
    try:
        with torch.device("meta"):
            return model.from_config(config)
    except Exception as error:  # each class fails in its own way on a value that it does not expect
        raise UserError(
            f"the transformer's configuration in {where} makes no {model.__name__} ({type(error).__name__}: "
            f"{shown(str(error))}); fetch the model again"
        ) from error


def _whole(value: Any) -> list[int]:
    """The whole numbers in a value of a configuration."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _whole(item)]
    return [value] if isinstance(value, int) else []


def base_fingerprint(base: str | Path, gguf: str | None = None) -> str:
    """`transformer_fingerprint` of a base model's transformer, or the sha256 of the `gguf` that stands in for it.

    UserError without weights in safetensors.
    """
    if gguf is not None:
        return file_sha256(Path(gguf))
    found = [transformer_fingerprint(place) for place in transformer_folders(base_folder(base))]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def base_fingerprints(base: str | Path, gguf: str | None = None) -> set[str]:
    """Every fingerprint that weights trained on this base may record: of the `gguf`, and of the folder's own weights.

    Of two transformers that of both, and that of the first, which a LoRA of one transformer adapts.
    """
    first = base_folder(base) / "transformer"
    own = any(first.glob("*.safetensors"))
    found = {base_fingerprint(base, one) for one in ([None] if own else []) + ([gguf] if gguf else [])}
    return found | ({transformer_fingerprint(first)} if own else set())


def transformer_fingerprint(folder: Path) -> str:
    """sha256 over a transformer folder's safetensors files and its configuration.

    The same for every copy of the folder; another training step, shape or rope gives another one. Paths and versions
    in the configuration do not count. UserError when there are no weights in safetensors.
    """
    config = {k: v for k, v in transformer_config(folder).items() if k == "_class_name" or not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{folder} holds no safetensors weights; save the base with safetensors")
    for shard in shards:
        digest.update(f"\n{shard.name} {file_sha256(shard)}".encode())
    return digest.hexdigest()


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype in which most of the transformer's parameters are stored (from the safetensors headers)."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if quantised(transformer_config(Path(folder) / "transformer")):
        return torch.bfloat16  # what it was rounded from is not kept, and nothing is gained by more
    counts: dict[str, int] = {}
    for shard in sorted((Path(folder) / "transformer").glob("*.safetensors")):
        header = read_header(shard)
        for key, dtype in header.dtype_of.items():
            counts[dtype] = counts.get(dtype, 0) + math.prod(header.shapes[key])
    return names.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def transformer_config(folder: Path, whole: bool = False) -> dict[str, Any]:
    """The config.json of a transformer folder; UserError when it cannot be read.

    `whole`: also for weights that are stored quantised, which nothing can be computed from but a forward.
    """
    config = read_json(folder / "config.json", "the transformer's configuration", mend="fetch the model again")
    if whole and quantised(config):
        raise UserError(f"{folder}: {quantised(config)}")
    return config


def quantised(config: Mapping[str, Any]) -> str | None:
    """Why weights of a transformer with this configuration cannot be read, when they are stored quantised; else None.
    """
    how = config.get("quantization_config")
    if not how:
        return None
    method = how.get("quant_method") if isinstance(how, dict) else None
    return f"its weights are stored quantised ({method or 'quantization_config'}); use the model in bf16, fp16 or fp32"


def file_sha256(file: Path) -> str:
    """sha256 of a file, computed once per process as long as its time and size stay the same."""
    stat = file.stat()
    key = (str(file.resolve()), stat.st_mtime_ns, stat.st_size)
    if key not in _HASHES:
        _HASHES[key] = sha256(file)
    return _HASHES[key]


def call_defaults(base: str | Path) -> dict[str, Any]:
    """The settings of a pipeline call in the `danceopd.json` beside a base's `model_index.json`; empty without one.

    UserError when it cannot be read, or gives what no call takes.
    """
    path = Path(base) / "danceopd.json"
    if not path.is_file():
        return {}
    settings = read_json(path, "the base's settings")
    try:
        return check_call({key: settings[key] for key in CALL_MOST if settings.get(key) is not None})
    except ValueError as error:
        raise UserError(f"the base's settings {path}: {error}; mend them") from None


def pipeline_call(base: Path, over: Mapping[str, float], family: Family | None = None) -> dict[str, Any]:
    """Height, width, num_inference_steps and settings for `GenerationPipeline` and `EditingPipeline`.

    The stock pipeline's defaults, overridden by the base's `danceopd.json`, overridden by the recipe's `call` (`over`).
    UserError for a setting of the recipe that `family` (None: the base's) does not take.
    """
    family = family or family_of(base)
    known = ("height", "width", "num_inference_steps", *family.call)
    odd = next((key for key in over if key not in known), None)
    if odd is not None:
        raise UserError(f"call.{odd} means nothing to {family.name}; leave it out of the recipe")
    return family.stock_call() | {key: value for key, value in call_defaults(base).items() if key in known} | dict(over)
