"""The student as an ordinary diffusers model: loaded by the stock pipeline, exported, fused, and proven.

Stock `load_lora_weights` can be a silent no-op, so nothing here trusts it: after every load the LoRA layers in
the transformer are read back and must be the file's, N of N, number for number. `export` also compares what
the reloaded transformer answers with what the student answered in training, and with the bare base. Files
take their place only after they have passed.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.base_model import (
    base_fingerprint,
    base_folder,
    empty_transformer,
    load_base,
    quietly,
    stored_dtype,
)
from danceopd.disk import disk_faults, part_of
from danceopd.errors import UserError
from danceopd.lora import WEIGHTS, Adapter, Header, inspect_adapter, read_adapter, write_adapter
from danceopd.lora_file import few
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition
from danceopd.shipped import portable, resolve

__all__ = ["ExportError", "Probe", "base_fingerprint", "checked", "export", "fuse", "fuse_in_place", "load_student"]

NAME = "student"  # of the adapter inside the pipeline


class ExportError(UserError):
    """The exported file does not do what the student did: the run fails, and what was there stays."""


@dataclass(frozen=True)
class Probe:
    """One question to the transformer and the student's answer to it at the end of training.

    `x (B, …)` fp32 latents, `sigma (B,)`, a Condition of B rows, `answer` the student's velocity, shape of `x`.
    """

    x: Tensor
    sigma: Tensor
    condition: Condition
    answer: Tensor

    @torch.no_grad()
    def ask(self, transformer: nn.Module) -> Tensor:
        """The same question to another transformer: its velocity, fp32."""
        return FAMILIES[self.condition.family].velocity(transformer, self.x, self.sigma, self.condition).float()


# Loading


def load_student(
    folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """The stock diffusers pipeline with the student in it, ready to call.

    `folder` is a run's output folder, a LoRA file, a shipped name, or a fused pipeline's folder. `base` (a folder,
    a shipped name, or a name on the hub) is taken from the folder's `recipe.yaml`, else from the file itself,
    when not given. `dtype` None is the stock default, fp32.

    Raises UserError when the base is not the one the student was trained on, a tensor does not fit it, or the
    stock loader did not put every layer in.
    """
    folder = Path(resolve(os.fspath(folder), "student"))
    if (folder / "model_index.json").is_file():
        pipe = load_base(folder, dtype)
    else:
        header, where = checked(folder, base)
        adapter = read_adapter(header.file, empty_transformer(where))
        pipe = load_base(where, dtype)
        plain = header.record and header.dialect in ("diffusers", "peft")  # others are read in other halves
        _load_lora(pipe, header.file if plain else adapter, adapter)
    return pipe if device is None else pipe.to(device)


def checked(folder: Path, base: str | os.PathLike | None) -> tuple[Header, Path]:
    """The student's header and its base's folder; UserError when they do not belong together."""
    header = inspect_adapter(folder)
    where = base_folder(os.fspath(base) if base is not None else _base_of(folder, header))
    said = header.record.get("base_sha256")
    if said and said != base_fingerprint(where):
        name = f" ({header.record['base']})" if header.record.get("base") else ""
        raise UserError(
            f"{header.file} was trained on another base{name} than {where}: the transformers' fingerprints differ "
            f"({said[:12]} and {base_fingerprint(where)[:12]}); give the base it was trained on"
        )
    return header, where


def _base_of(folder: Path, header: Header) -> str:
    recipe = (folder if folder.is_dir() else folder.parent) / "recipe.yaml"
    if recipe.is_file():
        from danceopd.sentences import read_yaml

        base = read_yaml(recipe, "recipe").get("base", "base")
    else:
        base = header.record.get("base")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{header.file} does not say which base model it belongs to (no recipe.yaml beside it, no note in it); "
            "give the base"
        )
    return base


def _load_lora(pipe: Any, source: Path | Adapter, adapter: Adapter) -> None:
    """Stock `load_lora_weights` of a file (or of an adapter, as a diffusers state dict), then the proof."""
    if isinstance(source, Path):
        pipe.load_lora_weights(source.parent, weight_name=source.name, adapter_name=NAME)
    else:
        halves = {
            f"transformer.{name}.lora_{half}.weight": tensor
            for name, pair in source.to().tensors.items()  # a copy: diffusers keeps the very tensors it is given
            for half, tensor in zip("AB", pair)
        }
        pipe.load_lora_weights(halves, adapter_name=NAME)
    check_injected(pipe.transformer, adapter)


def check_injected(transformer: nn.Module, adapter: Adapter, name: str = NAME) -> None:
    """Every layer of `adapter`, and no other, must act in the transformer under `name` with its own numbers.

    Raises ExportError otherwise. Numbers are compared in the dtype the layer holds them in.
    """
    from peft.tuners.lora import LoraLayer

    layers = {path: m for path, m in transformer.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}
    missing, extra = adapter.tensors.keys() - layers.keys(), layers.keys() - adapter.tensors.keys()
    wrong = []
    for path in adapter.tensors.keys() & layers.keys():
        layer: Any = layers[path]
        halves = (layer.lora_A[name].weight, layer.lora_B[name].weight)
        same = all(
            held.shape == given.shape and torch.equal(held.detach().cpu(), given.to(held.dtype))
            for held, given in zip(halves, adapter.tensors[path])
        )
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


# Writing


def export(
    adapter: Adapter,
    folder: str | os.PathLike,
    base: str | os.PathLike,
    probes: Sequence[Probe],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    load: Callable[[], Any] | None = None,
    tolerance: float = 0.02,
) -> Path:
    """Write the student's LoRA to `folder`, prove it through a fresh stock pipeline, and only then let it stay.

    `base` goes into the file with its fingerprint. `load` returns a FRESH stock pipeline of it and is asked once
    (default: `base` in fp32; for a bf16 backbone give one in bf16; leave out what the probes do not need). The
    reloaded answers may differ from the probes' by `tolerance` of the change the student makes, plus the
    rounding of the backbone's dtype.

    Returns the file's path. Raises ExportError when the file changes nothing or something else, or the
    student equals its base; UserError when it cannot be written.
    """
    if not probes:
        raise ValueError("an export is proven with at least one probe")
    folder = Path(folder)
    where = base_folder(os.fspath(base))
    record = {**(metadata or {}), "base": portable(os.fspath(base)), "base_sha256": base_fingerprint(where)}
    trial = part_of(folder / "export")
    try:
        file = write_adapter(adapter, trial, dtype, record)
        pipe = load() if load is not None else load_base(where)
        pipe.transformer.to(probes[0].x.device).eval()
        bare = [probe.ask(pipe.transformer) for probe in probes]
        _load_lora(pipe, file, read_adapter(file, pipe.transformer))
        loaded = [probe.ask(pipe.transformer) for probe in probes]
        _compare(probes, bare, loaded, pipe.transformer.dtype, tolerance)
        with disk_faults(folder / WEIGHTS):
            os.replace(file, folder / WEIGHTS)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder / WEIGHTS


def _compare(
    probes: Sequence[Probe], bare: list[Tensor], loaded: list[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    student, base, file = (
        torch.cat([answer.detach().float().cpu().flatten() for answer in answers])
        for answers in ([probe.answer for probe in probes], bare, loaded)
    )
    if not student.isfinite().all():
        raise ExportError("the student answers NaN or infinity; its training diverged, lower the learning rate")
    if torch.equal(student, base):
        raise ExportError("the student equals its base, so there is nothing to export; train it for longer")
    if torch.equal(file, base):
        raise ExportError(
            "the exported LoRA changes nothing in the stock pipeline, though the student differs "
            "from its base; report this with your diffusers and peft versions"
        )
    change, error = float((student - base).norm()), float((file - student).norm())
    if not error <= tolerance * change + 4 * torch.finfo(dtype).eps * float(student.norm()):
        raise ExportError(
            f"the exported LoRA is not the student: reloaded, its answers are {error / change:.1%} of the student's "
            f"change away from the student's (at most {tolerance:.1%} allowed); report this with your diffusers "
            "and peft versions"
        )


def fuse(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a whole pipeline with the student fused into its weights: `DiffusionPipeline.from_pretrained(output)`.

    `dtype` None is the one the base's transformer is stored in. The written pipeline is loaded back and every
    weight compared with W + BA before it takes its place. Needs memory for two transformers.

    Returns `output`. Raises UserError when it exists and is not empty, ExportError when fusing changed
    nothing or something else.
    """
    folder, output = Path(resolve(os.fspath(folder), "student")), Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; name another one")
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole pipeline already; copy it, or give a student's LoRA folder")
    header, where = checked(folder, base)
    pipe = load_student(folder, base=where, dtype=dtype or stored_dtype(where))
    adapter = read_adapter(header.file, pipe.transformer)
    weights = {name: pipe.transformer.get_submodule(name).weight for name in adapter.tensors}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    pipe.fuse_lora(adapter_names=[NAME])
    pipe.unload_lora_weights()
    _check_fused(pipe.transformer, adapter, before)
    trial = part_of(output)
    try:
        with disk_faults(output), quietly():
            output.parent.mkdir(parents=True, exist_ok=True)
            pipe.save_pretrained(trial, safe_serialization=True)
            for kept in (where / "danceopd.json", folder / "recipe.yaml"):  # how to call it, how it was made
                if kept.is_file():
                    shutil.copyfile(kept, trial / kept.name)
        written = load_base(trial, pipe.transformer.dtype).transformer.state_dict()
        wanted = pipe.transformer.state_dict()
        lost = [key for key in wanted if key not in written or not torch.equal(written[key], wanted[key])]
        if lost or written.keys() - wanted.keys():
            raise ExportError(f"the fused pipeline does not load back as written ({few(lost)}); report this")
        with disk_faults(output):
            os.replace(trial, output)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return output


def fuse_in_place(folder: str | os.PathLike) -> Path:
    """Turn a run folder into a whole pipeline too: `DiffusionPipeline.from_pretrained(folder)` alone loads it.

    The LoRA and everything else that is there stays. Raises as `fuse`; does nothing when it is one already.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return folder
    trial = folder / ".fused"
    shutil.rmtree(trial, ignore_errors=True)
    try:
        fuse(folder, trial)
        # model_index.json goes last: until then the folder is no pipeline, and fusing can be repeated.
        for item in sorted(trial.iterdir(), key=lambda part: part.name == "model_index.json"):
            if not (folder / item.name).is_file():
                shutil.rmtree(folder / item.name, ignore_errors=True)
                os.replace(item, folder / item.name)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder


def _check_fused(transformer: nn.Module, adapter: Adapter, before: Mapping[str, Tensor]) -> None:
    """Each adapted weight must be W + BA up to the rounding of its dtype, and together they must differ from W."""
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
