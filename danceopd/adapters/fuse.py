"""`fuse`: a student's LoRA and its base go in, a whole pipeline with the LoRA in its weights comes out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.load import ADAPTER_NAME, ExportError, check_base, load_student
from danceopd.adapters.read import read_adapter
from danceopd.common.files import disk_errors, partial_path, write_json
from danceopd.common.messages import few
from danceopd.common.shipped import resolve
from danceopd.errors import UserError
from danceopd.models.base import call_defaults, load_base, quietly, stored_dtype, transformer_folders
from danceopd.models.lora import Adapter
from danceopd.recipe.recorded import recorded_recipe


def fuse(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a whole pipeline with the student fused into its weights: `DiffusionPipeline.from_pretrained(output)`.

    `dtype` None is the one the base's transformer is stored in. The written pipeline is loaded back and every
    weight compared with W + BA before it takes its place. Needs memory for two transformers.

    Returns `output`. UserError when it exists and is not empty, ExportError when fusing changed nothing, or changed
    something to another value.
    """
    folder, output = Path(resolve(os.fspath(folder), "student")), Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; name another one")
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole pipeline already; copy it, or give a student's LoRA folder")
    header, where = check_base(folder, base)
    if len(transformer_folders(where)) > 1:
        raise UserError(f"{where} has two transformers, into which a student is not fused; load it as a LoRA")
    pipe = load_student(folder, base=where, dtype=dtype or stored_dtype(where))
    adapter = read_adapter(header.file, pipe.transformer)
    weights = {name: pipe.transformer.get_submodule(name).weight for name in adapter.tensors}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    has_loader = hasattr(pipe, "fuse_lora")  # else its transformer does it
    (pipe if has_loader else pipe.transformer).fuse_lora(adapter_names=[ADAPTER_NAME])
    pipe.unload_lora_weights() if has_loader else pipe.transformer.unload_lora()
    _check_fused(pipe.transformer, adapter, before)
    trial = partial_path(output)
    try:
        with disk_errors(output), quietly():
            output.parent.mkdir(parents=True, exist_ok=True)
            pipe.save_pretrained(trial, safe_serialization=True)
            settings = call_defaults(where)  # how to call it
            if (folder / "recipe.yaml").is_file():  # how it was made
                shutil.copyfile(folder / "recipe.yaml", trial / "recipe.yaml")
                settings |= recorded_recipe(folder).get("call") or {}
            if settings or (where / "danceopd.json").is_file():
                write_json(trial / "danceopd.json", settings)
        written = load_base(trial, pipe.transformer.dtype).transformer.state_dict()
        wanted = pipe.transformer.state_dict()
        lost = [key for key in wanted if key not in written or not torch.equal(written[key], wanted[key])]
        if lost or written.keys() - wanted.keys():
            raise ExportError(f"the fused pipeline does not load back as written ({few(lost)}); report this")
        with disk_errors(output):
            os.replace(trial, output)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return output


def fuse_in_place(folder: str | os.PathLike) -> Path:
    """Make a run folder a whole pipeline, too, so that `DiffusionPipeline.from_pretrained(folder)` loads it.

    Everything in the folder stays. Raises as `fuse`; does nothing when it is a pipeline already.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return folder
    trial = folder / ".fused"
    shutil.rmtree(trial, ignore_errors=True)
    try:
        fuse(folder, trial)
        # model_index.json comes last: until then the folder is no pipeline, and fusing can be repeated.
        for item in sorted(trial.iterdir(), key=lambda part: part.name == "model_index.json"):
            if not (folder / item.name).is_file():
                shutil.rmtree(folder / item.name, ignore_errors=True)
                os.replace(item, folder / item.name)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder


def _check_fused(transformer: nn.Module, adapter: Adapter, before: Mapping[str, Tensor]) -> None:
    """ExportError unless each adapted weight is W + BA up to the rounding of its dtype, and some weight changed."""
    moved, wrong = False, []
    for name, old in before.items():
        layer: Any = transformer.get_submodule(name)
        new, delta = layer.weight.detach(), adapter.delta(name).to(layer.weight.device)
        moved = moved or not torch.equal(new, old)
        rounding = 16 * torch.finfo(old.dtype).eps * (old.float().abs() + delta.abs().max())
        if ((new.float() - old.float() - delta).abs() > rounding).any():
            wrong.append(name)
    if wrong:
        raise ExportError(f"fusing changed {few(wrong)} to something else than W + BA; report this")
    if not moved:
        raise ExportError(
            f"fusing changed nothing: the student's weights vanish in {next(iter(before.values())).dtype}; "
            "fuse in a wider dtype, or keep the LoRA"
        )
