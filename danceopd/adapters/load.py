"""`load_student`: a run's folder or a LoRA file goes in, the stock diffusers pipeline with that LoRA comes out.

Where the stock pipeline has no LoRA loader, its transformer's is used. Stock `load_lora_weights` can silently do
nothing. So after every load the LoRA layers in the transformer are read back
and must equal the file's, every layer and every number (`check_injected`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danceopd.adapters.dialects import stock_name
from danceopd.adapters.header import LoraHeader, inspect_adapter
from danceopd.adapters.read import read_adapter
from danceopd.common.messages import few
from danceopd.common.shipped import resolve
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, base_fingerprints, base_folder, empty_transformer, load_base
from danceopd.models.lora import Adapter
from danceopd.pipelines.two_transformers import SECOND, joined, of_second, parted
from danceopd.recipe.recorded import recorded_recipe

ADAPTER_NAME = "student"
"""The adapter's name in the loaded pipeline."""


class ExportError(UserError):
    """A written file does not give what the student gave: nothing is replaced, and the command fails."""


def load_student(
    folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    accept: str | None = None,
) -> Any:
    """The stock diffusers pipeline with the student's LoRA loaded, ready to call.

    `folder` is a run's output folder, a LoRA file, a shipped name, or a fused pipeline's folder. `base` is a folder, a
    shipped name, or a name on the hub; by default it is read from the folder's `recipe.yaml`, else from the file.
    `dtype` None is the stock default, fp32. `accept` "base" takes a base of the same layers that the student was not
    trained on, such as the few-step model beside the one that was trained.

    UserError when the base is not the one the student was trained on, when a tensor does not fit it, or when the
    stock loader left a layer out.
    """
    folder = Path(resolve(os.fspath(folder), "student"))
    if (folder / "model_index.json").is_file():
        pipe = load_base(folder, dtype)
    else:
        header, where = check_base(folder, base, accept)
        adapter = read_adapter(header.file, empty_transformer(where))
        pipe = load_base(where, dtype)
        # diffusers reads our own files exactly; what it reads from other files may differ
        plain = header.record and header.dialect in ("diffusers", "peft")
        load_lora(pipe, header.file if plain else adapter, adapter)
    parted(pipe)
    return pipe if device is None else pipe.to(device)


def base_of_student(student: str | os.PathLike, base: str | os.PathLike | None, accept: str | None = None) -> Path:
    """The pipeline folder that `load_student` would load."""
    folder = Path(resolve(os.fspath(student), "student"))
    return folder if (folder / "model_index.json").is_file() else check_base(folder, base, accept)[1]


def check_base(
    folder: Path, base: str | os.PathLike | None, accept: str | None = None
) -> tuple[LoraHeader, Path]:
    """The student's header and its base's folder; UserError when the file was trained on another base, which `accept`
    "base" allows."""
    if accept not in (None, "base"):
        raise UserError(f"accept is {accept!r}; it can be base, which takes another base than the student's own")
    header = inspect_adapter(folder)
    where = base_folder(os.fspath(base) if base is not None else _base_of(folder, header))
    trained_on = header.record.get("base_sha256")
    if trained_on and accept is None and trained_on not in {base_fingerprint(where), *base_fingerprints(where)}:
        name = f" ({header.record['base']})" if header.record.get("base") else ""
        raise UserError(
            f"{header.file} was trained on another base{name} than {where}: the transformers' fingerprints differ "
            f"({trained_on[:12]} and {base_fingerprint(where)[:12]}); give the base it was trained on, or, "
            "where it is meant for this one, accept base"
        )
    return header, where


def _base_of(folder: Path, header: LoraHeader) -> str:
    run = folder if folder.is_dir() else folder.parent
    if (run / "recipe.yaml").is_file():
        base = recorded_recipe(run).get("base", "base")
    else:
        base = header.record.get("base")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{header.file} does not say which base model it belongs to (no recipe.yaml beside it, nothing in its "
            "metadata); give the base"
        )
    if os.path.isabs(base) and not os.path.exists(base):
        raise UserError(f"the base of {header.file} is no longer at {base}; give its folder with --base")
    return base


def lora_loader(pipe: Any) -> Any:
    """A stock pipeline's `load_lora_weights`, else `load_lora_adapter` of its transformer: takes a folder or a dict."""
    return getattr(pipe, "load_lora_weights", None) or pipe.transformer.load_lora_adapter


def load_lora(pipe: Any, source: Path | Adapter, adapter: Adapter, name: str = ADAPTER_NAME) -> None:
    """Stock loading of a file (or of an adapter, as a diffusers state dict), then `check_injected`; it acts alone.

    Of a pipeline with two transformers each takes its own layers.
    """
    how: dict[str, Any] = {"adapter_name": name}
    if isinstance(source, Path):
        given: Any = source.parent
        how["weight_name"] = source.name
    else:
        given = {
            f"{stock_name(layer)}.lora_{half}.weight": tensor
            for layer, pair in source.to().tensors.items()  # a copy: diffusers keeps the very tensors it is given
            for half, tensor in zip("AB", pair)
        }
    second = parted(pipe)
    seconds = of_second(adapter.tensors)
    if len(seconds) < len(adapter):
        lora_loader(pipe)(given, **how)
    if second is not None and seconds:
        second.load_lora_adapter(given, prefix=SECOND, **how)
    for transformer in filter(None, (pipe.transformer, second)):
        if len(getattr(transformer, "peft_config", ())) > 1:  # the first one acts as it was loaded, which is checked
            transformer.set_adapters([name])
    if second is not None:
        joined(pipe.transformer, second, pipe.transformer.boundary)
    check_injected(pipe.transformer, adapter, name)


def check_injected(transformer: nn.Module, adapter: Adapter, name: str = ADAPTER_NAME) -> None:
    """ExportError unless the active LoRA `name` of the transformer has exactly the layers and numbers of `adapter`.

    Numbers are compared in the dtype of the layer. A layer may have a larger rank whose rest is zero, as `fill` writes.
    """
    from peft.tuners.lora import LoraLayer

    layers = {path: m for path, m in transformer.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    missing, extra = adapter.tensors.keys() - layers.keys(), layers.keys() - adapter.tensors.keys()
    wrong = []
    for path in adapter.tensors.keys() & layers.keys():
        layer: Any = layers[path]
        a, b = (half[name].weight.detach().cpu() for half in (layer.lora_A, layer.lora_B))
        rank = adapter.ranks[path]
        pairs = zip((a[:rank], b[:, :rank]), adapter.tensors[path])
        same = all(held.shape == given.shape and torch.equal(held, given.to(held.dtype)) for held, given in pairs)
        same = same and not (a[rank:].any() or b[:, rank:].any())
        if not same or layer.scaling[name] != 1.0 or name not in layer.active_adapters or layer.disable_adapters:
            wrong.append(path)
    if missing or extra or wrong:
        total = len(adapter)
        raise ExportError(
            f"stock diffusers loaded {total - len(missing) - len(wrong)} of the student's {total} layers"
            + (f", left out {few(missing)}" if missing else "")
            + (f", invented {few(extra)}" if extra else "")
            + (f", changed {few(wrong)}" if wrong else "")
            + "; report this with your diffusers and peft versions"
        )
