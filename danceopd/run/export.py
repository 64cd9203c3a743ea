"""The end of a run: the student's EMA is written, proven through the stock pipeline, and gets its model card.

`export` writes a LoRA to a temporary name, loads it back with a stock pipeline, compares its velocities with the
student's at the end of training, and only then lets the file take its place. Stock `load_lora_weights` can be a silent
no-op, so nothing here trusts it. The pipeline is the run's own, on its own transformer: everything of training has left
it, and its weights are compared with those on disk. So the proof takes the base and one LoRA, never a second base.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.header import WEIGHTS
from danceopd.adapters.load import ExportError, load_lora
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, partial_path
from danceopd.common.shipped import portable
from danceopd.common.system import out_of_memory
from danceopd.common.tensors import DTYPES
from danceopd.data.dataset import of_one_layout
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import Trainer
from danceopd.errors import UserError
from danceopd.kernels import uninstall
from danceopd.models.backbone import Backbone
from danceopd.models.base import base_fingerprint, base_folder, empty_transformer, load_base, pipeline_index
from danceopd.models.checkpoint import open_checkpoint
from danceopd.models.compile import eager_blocks
from danceopd.models.fields import BaseField, VelocityField
from danceopd.models.lora import Adapter
from danceopd.models.storage import dequantised, kept_as, offload, quantised_weight
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import FAMILIES
from danceopd.pipelines.two_transformers import SECOND
from danceopd.recipe.recipe import Recipe
from danceopd.run.card import load_snippet, write_card
from danceopd.run.directory import RunDirectory


class NotFinite(ExportError):
    """The student's velocities are NaN or infinite."""


@dataclass(frozen=True)
class Origin:
    """What a student was made from: the base's folder and fingerprint, its call, the teachers' hashes, and a sentence
    on the student's init."""

    base: Path
    fingerprint: str
    call: Mapping[str, Any]
    hashes: Mapping[str, str]
    init: str
    saved: str | None = None  # in which kind the base was saved quantised


def _teachers(recipe: Recipe) -> str:
    """The teachers in words, for the file's metadata: name, capability and trigger of each."""
    return "; ".join(
        f"{one.name} ({one.capability}{f', trigger: {one.trigger}' if one.trigger else ''})" for one in recipe.teachers
    )


def stock_dtype(dtype: str) -> torch.dtype | None:
    """The dtype to load the base in; None is the stock default, fp32."""
    return None if dtype == "fp32" else DTYPES[dtype]


def write_student(
    trainer: Trainer, recipe: Recipe, student: Adapter, step: int, origin: Origin, run: RunDirectory | None,
    processes: Processes, pipe: Any | None, sentences: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write `student`, the EMA after `step`, into the run's folder; all processes call it, the first writes.

    `pipe` is the base's stock pipeline, in which the file is proven on the backbone's transformer; None, where no
    process has the whole of that: in a fresh one on the CPU. It ends the training: `trainer` is released.
    `sentences` are what the card says of the run. ExportError when the written file is not the student.
    """
    quantised = recipe.base_dtype or origin.saved
    fields = [trainer.ema_field(student, merged=False), *([BaseField(trainer.backbone)] if quantised else [])]
    probes = [probe for teacher in trainer.teachers for probe in _probes(trainer, teacher, fields, recipe.seed)]
    trainer.release()
    with processes.main_first():
        if run is None:
            return
        facts = {"steps": str(step), "seed": str(recipe.seed), "teachers": _teachers(recipe)}
        if recipe.fast is not None:
            facts["num_inference_steps"] = str(recipe.fast.steps)
        load: Callable[[], Any] = partial(load_base, origin.base, stock_dtype(recipe.dtype))
        if pipe is None:
            probes = [probe.to(torch.device("cpu")) for probe in probes]
        else:
            load = partial(_with_own_transformer, pipe, trainer.backbone.transformer, origin, recipe)
        also, said = None, list(sentences)
        if quantised:
            also = partial(_on_the_whole_base, probes=probes, recipe=recipe, origin=origin, said=said)
        export(student, run.path, recipe.base, probes, metadata=facts, load=load, also=also)
        # The student is trained without guidance; stock pipelines would add it unasked.
        call = {**origin.call, **trainer.backbone.family.guidance_off}
        grid = run.logger.picture(step)
        write_card(
            run.path,
            recipe,
            hashes={**origin.hashes, "base": origin.fingerprint, "student": student.sha256},
            snippet=load_snippet(
                str(recipe.resolved()["base"]), call, family=trainer.backbone.family,
                teachers=recipe.resolved()["teachers"], two=hasattr(trainer.backbone.transformer, SECOND),
            ),  # fmt: skip
            grid=grid if grid.exists() else None,
            init=origin.init,
            sentences=said,
        )


def _probes(trainer: Trainer, teacher: RoutedTeacher, fields: Sequence[VelocityField], seed: int) -> Iterator[Probe]:
    """Four of a teacher's rows, or fewer, each at a noise level of its own; a probe has no more rows than a forward.

    `fields` are the student and, where it is needed, the base.
    """
    condition = teacher.dataset.rows(of_one_layout(teacher.dataset, 4))
    x = torch.randn(len(condition), *condition.shape, generator=torch.Generator().manual_seed(seed))
    sigma, size = torch.linspace(1.0, 0.25, len(condition)), trainer.batches.micro_batch
    for rows in (slice(start, start + size) for start in range(0, len(condition), size)):
        inputs = x[rows].to(trainer.device), sigma[rows].to(trainer.device), condition.rows(rows).to(trainer.device)
        yield Probe(*inputs, *(field(*inputs) for field in fields))


def _with_own_transformer(pipe: Any, transformer: nn.Module, origin: Origin, recipe: Recipe) -> Any:
    """`pipe` with the transformer that was trained on, a stock one again; ExportError unless its weights are those on
    disk: quantised again where they were quantised here. Those of a quantised file are taken as they are.
    """
    uninstall(transformer)
    eager_blocks(transformer)
    pipe.transformer = transformer
    if hasattr(transformer, SECOND):
        pipe.transformer_2 = transformer.transformer_2
    if recipe.gguf is not None or origin.saved:
        return pipe
    stored, dtype = open_checkpoint(origin.base), DTYPES[recipe.dtype]
    for name in empty_transformer(origin.base).state_dict():
        path, _, leaf = name.rpartition(".")
        module: Any = transformer.get_submodule(path)
        held, given = getattr(module, leaf), stored.tensor(name)
        if kept_as(module) and leaf == "weight":
            held = dequantised(module, dtype)
            given = quantised_weight(given.to(dtype), str(recipe.base_dtype), module.weight.device)
        if not torch.equal(given.to(held.device, held.dtype), held):
            raise ExportError(
                f"{name} of the base is not what {origin.base} holds, so nothing proven on it would count"
            )
    return pipe


def _on_the_whole_base(file: Path, probes: Sequence[Probe], recipe: Recipe, origin: Origin, said: list[str]) -> None:
    """Load a student of a quantised base on the base in full precision, where that is at hand, and say what it does.

    On a GPU the base comes block by block. ExportError when the file changes nothing there.
    """
    if origin.saved or not any((origin.base / "transformer").glob("*.safetensors")):
        said.append("the export is proven on the quantised base alone: the base in full precision is not at hand")
    else:
        try:
            said.append(_away_from_the_whole_base(file, probes, recipe, origin))
        except ExportError:
            raise
        except Exception as error:  # the file is proven already: this only says more of it
            if not (isinstance(error, UserError) or out_of_memory(error)):
                raise
            said.append(
                "the export is proven on the quantised base alone: the base in full precision could not be compared "
                f"({(str(error).splitlines() or [type(error).__name__])[0][:160]})"
            )
    print(said[-1], file=sys.stderr, flush=True)


def _away_from_the_whole_base(file: Path, probes: Sequence[Probe], recipe: Recipe, origin: Origin) -> str:
    """How far from the quantised base's the change is that a file makes on the base in full precision, in words."""
    listed = pipeline_index(origin.base).items()
    rest = [name for name, value in listed if isinstance(value, list) and name not in ("transformer", "scheduler")]
    pipe = load_base(origin.base, stock_dtype(recipe.dtype), **dict.fromkeys(rest))
    backbone = Backbone(pipe.transformer, FAMILIES[probes[0].condition.family])
    if probes[0].x.device.type == "cuda":
        offload(backbone, probes[0].x.device, pin=False)  # a few forwards, for which no copy of the base is locked
    bare = [probe.velocity_of(pipe.transformer) for probe in probes]
    load_lora(pipe, file, read_adapter(file, pipe.transformer))
    pairs = zip(probes, bare, [probe.velocity_of(pipe.transformer) for probe in probes])
    moved, away = 0.0, 0.0
    for probe, base, loaded in pairs:
        change = (probe.velocity - probe.bare).float() if probe.bare is not None else loaded - base
        moved, away = moved + float(change.square().sum()), away + float((loaded - base - change).square().sum())
        if not loaded.isfinite().all() or torch.equal(loaded, base):
            raise ExportError(
                "the exported LoRA changes nothing on the base in full precision, or gives NaN there, though it "
                "works on the quantised one; report this with your diffusers and peft versions"
            )
    share = (away / moved) ** 0.5
    return (
        f"the export is proven on the quantised base; on the base in full precision its change of the velocity is "
        f"{share:.1%} of its size away from that"
    )


@dataclass(frozen=True)
class Probe:
    """Inputs of the transformer, and the student's velocity there at the end of training.

    `x (B, …)` fp32 latents, `sigma (B,)`, a Condition of B rows, `velocity` of the shape of `x`; `bare` the base's.
    """

    x: Tensor
    sigma: Tensor
    condition: Condition
    velocity: Tensor
    bare: Tensor | None = None

    def to(self, device: torch.device) -> Probe:
        """The same on another device."""
        bare = None if self.bare is None else self.bare.to(device)
        given = self.x.to(device), self.sigma.to(device), self.condition.to(device), self.velocity.to(device)
        return Probe(*given, bare)

    @torch.no_grad()
    def velocity_of(self, transformer: nn.Module) -> Tensor:
        """Another transformer's velocity there, fp32."""
        return FAMILIES[self.condition.family].velocity(transformer, self.x, self.sigma, self.condition).float()


def export(
    adapter: Adapter, folder: str | os.PathLike, base: str | os.PathLike, probes: Sequence[Probe], *,
    dtype: torch.dtype = torch.float32, metadata: Mapping[str, str] | None = None,
    load: Callable[[], Any] | None = None, tolerance: float = 0.02, also: Callable[[Path], None] | None = None,
) -> Path:  # fmt: skip
    """Write the student's LoRA to `folder`, prove it through a stock pipeline, and only then let it stay.

    `base` goes into the file with its fingerprint. `load` returns a stock pipeline of it without a LoRA and is called
    once (default: `base` in fp32; for a bf16 backbone give one in bf16; leave out what the probes do not need). The
    reloaded velocities may differ from the probes' by `tolerance` of the change the student makes, plus the
    rounding of the backbone's dtype. `also` is called with the proven file before it stays.

    Returns the file's path. Raises ExportError when the file changes nothing or something else, or the
    student equals its base; UserError when it cannot be written.
    """
    if not probes:
        raise ValueError("an export is proven with at least one probe")
    folder = Path(folder)
    where = base_folder(os.fspath(base))
    record = {**(metadata or {}), "base": portable(os.fspath(base))}
    if any((where / "transformer").glob("*.safetensors")):  # not where a GGUF stands in for it
        record["base_sha256"] = base_fingerprint(where)
    trial = partial_path(folder / "export")
    try:
        file = write_adapter(adapter, trial, dtype, record)
        pipe = load() if load is not None else load_base(where)
        if not getattr(pipe.transformer, "offloaded", False):
            pipe.transformer.to(probes[0].x.device)
        pipe.transformer.eval()
        bare, computed = [probe.velocity_of(pipe.transformer) for probe in probes], pipe.transformer.dtype
        load_lora(pipe, file, read_adapter(file, pipe.transformer))
        loaded = [probe.velocity_of(pipe.transformer) for probe in probes]
        _compare(probes, bare, loaded, computed, tolerance)
        if also is not None:  # its ExportError leaves what stood there before
            also(file)
        with disk_errors(folder / WEIGHTS):
            os.replace(file, folder / WEIGHTS)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return folder / WEIGHTS


def _compare(
    probes: Sequence[Probe], bare: list[Tensor], loaded: list[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    student, base, file = (
        torch.cat([velocity.detach().float().cpu().flatten() for velocity in velocities])
        for velocities in ([probe.velocity for probe in probes], bare, loaded)
    )
    if not student.isfinite().all():
        raise NotFinite("the student predicts NaN or infinity; its training diverged, lower optimizer.lr")
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
            f"the exported LoRA is not the student: reloaded, its velocities are {error / change:.1%} of the student's "
            f"change away from the student's (at most {tolerance:.1%} allowed); report this with your diffusers "
            "and peft versions"
        )
