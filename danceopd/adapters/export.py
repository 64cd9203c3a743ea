"""`export_as`: write a student or any LoRA in the format of another tool, and check the file by reading it back.

diffusers: `transformer.`, A and B.  peft: `adapter_model.safetensors` with its configuration.  comfyui:
`diffusion_model.` and kohya: `lora_unet_` with alpha, both with the original model's Linears where the tool knows
only those (`original_names.py`). Before a file takes its place, it is read by `read_adapter` and by the converter that
stock `load_lora_weights` uses. A format without a table of names is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.blend import scaled
from danceopd.adapters.dialects import linear_sizes, split_key, stock_name
from danceopd.adapters.header import METADATA_KEY, WEIGHTS, inspect_adapter
from danceopd.adapters.load import ExportError, check_base
from danceopd.adapters.original_names import ARCHITECTURES, ArchitectureNames, Pair, Sizes
from danceopd.adapters.read import read_adapter
from danceopd.adapters.svd import truncate_product
from danceopd.adapters.write import check_range, fill
from danceopd.common.files import disk_errors, fsync_path, partial_path
from danceopd.common.messages import did_you_mean, few
from danceopd.common.shipped import portable, resolve
from danceopd.common.tensors import DTYPES
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, empty_transformer, transformer_fingerprint
from danceopd.models.lora import Adapter
from danceopd.pipelines.two_transformers import PREFIX, SECOND, of_second

FORMATS = ("diffusers", "comfyui", "peft", "kohya")
CARRIED = ("teachers", "num_inference_steps")
"""Of a student's record, what its export says too."""


@dataclass(frozen=True)
class ExportedFile:
    """What was written: the number of layers in the file, the largest rank, and what rank and dtype lost.

    `residual` is ‖Δ − Δ'‖ / ‖Δ‖. `stock` says whether the converter of stock diffusers reads the same adapter (None: it
    has none for this format).
    """

    file: Path
    layers: int
    rank: int
    residual: float
    stock: bool | None
    note: str = ""  # why stock diffusers cannot
    empty: bool = False  # B·A is zero everywhere

    @property
    def sentence(self) -> str:
        """One line: what was written, what it lost, and who has read it back."""
        lost = "exact" if self.residual < 1e-6 else f"{self.residual:.2%} of it lost to rank and dtype"
        if self.empty:
            lost = "empty: B·A is zero in every layer, so it changes nothing"
        readers = {
            True: "read back by danceopd and by stock diffusers",
            False: f"read back by danceopd; stock diffusers cannot ({self.note})",
            None: "read back by danceopd; stock diffusers has no converter for this format",
        }
        return f"{self.file}: {self.layers} layers, rank {self.rank}, {lost}; {readers[self.stock]}"


def export_as(
    student: str | os.PathLike,
    output: str | os.PathLike,
    format: str = "diffusers",
    dtype: str = "fp32",
    base: str | os.PathLike | None = None,
    rank: int | None = None,
    drop: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    second: str | os.PathLike | None = None,
) -> ExportedFile:
    """Write a student, or any LoRA, into the folder `output` in one of FORMATS.

    `student` is a run's folder, a LoRA, or a shipped name; `base` as for `load_student`, only its configuration is
    read. Where the tool has one Linear for q, k and v, their pairs are joined exactly and the ranks add up, unless
    `rank` limits them: then the closest pair of that rank is written and `residual` says what that lost. `drop` and
    `leave_out` as for `read_adapter`; `residual` is of what was read. `second` is a LoRA of the second of a base's two
    transformers, which goes into the same file.

    UserError for a format that this architecture has no table for, and when the file exists already; ExportError when
    the written file reads back as something else.
    """
    for word, known, what in ((format, FORMATS, "format"), (dtype, DTYPES, "dtype")):
        if word not in known:
            raise UserError(f"there is no {what} {word!r}{did_you_mean(word, known)}")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} holds nothing; give 1 or more")
    header, where = check_base(Path(resolve(os.fspath(student), "student")), base)
    transformer = empty_transformer(where)
    adapter = read_adapter(header.file, transformer, drop=drop, leave_out=leave_out)
    if second is not None:
        adapter = _with_second(adapter, second, transformer, where)
    name = Path(student).stem if Path(student).suffix == ".safetensors" else Path(student).resolve().name
    file = Path(output).expanduser() / {"diffusers": WEIGHTS, "peft": "adapter_model.safetensors"}.get(
        format, f"{name}.safetensors"
    )
    for path in (file, file.with_name("adapter_config.json")) if format == "peft" else (file,):
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten; name another output folder")
    name_of_base = header.record.get("base") or (os.fspath(base) if base is not None else str(where))
    record = {"base": portable(str(name_of_base)), "base_sha256": base_fingerprint(where)}
    record["source_sha256"] = adapter.sha256
    record |= {key: header.record[key] for key in CARRIED if key in header.record}
    return write_as(adapter, file, format, transformer, DTYPES[dtype], rank, record)


def _with_second(adapter: Adapter, file: str | os.PathLike, transformer: nn.Module, base: Path) -> Adapter:
    """The adapter, and that of a file for the second of two transformers."""
    if not hasattr(transformer, SECOND):
        raise UserError(f"second is {file}, and {base} has one transformer; leave it out")
    if of_second(adapter.tensors):
        raise UserError(f"second is {file}, and the first file has layers of both transformers already; leave it out")
    trained_on = inspect_adapter(file).record.get("base_sha256")
    mine = transformer_fingerprint(base / SECOND)
    if trained_on not in (None, mine, base_fingerprint(base)):
        raise UserError(
            f"second is {file}, which was trained on other weights than {base / SECOND} (their fingerprints differ: "
            f"{trained_on[:12]} and {mine[:12]}); give the LoRA of the second transformer"
        )
    found = read_adapter(file, transformer.get_submodule(SECOND)).tensors
    return Adapter(adapter.tensors | {PREFIX + name: pair for name, pair in found.items()})


def write_as(
    adapter: Adapter,
    file: Path,
    format: str,
    transformer: nn.Module,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> ExportedFile:
    """Write an adapter of `transformer` (on the meta device, if you like) to `file`, checked before it takes its place.

    `record` goes into the file's `danceopd` metadata. Raises as `export_as`; UserError for numbers beyond `dtype`,
    ValueError for an adapter without layers, or not finite.
    """
    names, layers = ARCHITECTURES.get(type(transformer).__name__), dict(adapter.tensors)
    if not layers:
        raise ValueError("an adapter without layers is not written")
    if format != "diffusers" and (second := of_second(layers)):
        if len(second) < len(layers):
            raise UserError(
                f"a {format} file is a LoRA of one transformer, and this one adapts two; write a file for each: with "
                "--leave-out 'transformer_2.*', and with --leave-out 'blocks.*'"
            )
        return write_as(Adapter(second), file, format, transformer.get_submodule(SECOND), dtype, rank, record)
    sizes = linear_sizes(transformer)
    original = naming(names, format, transformer) == "original"
    if names is not None and original:
        layers = names.join(layers, sizes)
    if rank is not None:
        layers = {layer: truncate_product(a, b, rank)[0] for layer, (a, b) in layers.items()}
    check_range(layers, dtype)
    layers = {layer: (_rounded(a, dtype), _rounded(b, dtype)) for layer, (a, b) in layers.items()}
    written = _adapter_of(layers, names if original else None, sizes)
    facts = dict(record or {}) | {"format": format, "modules": len(written), "sha256": written.sha256}
    if format in ("diffusers", "peft"):  # kohya's files have an alpha a layer, and ComfyUI takes each layer's own rank
        layers, ranks = fill(layers)
        facts |= ranks
    trial = partial_path(file)
    try:
        with disk_errors(file):
            trial.mkdir(parents=True)
        draft = trial / file.name
        _write(draft, layers, format, names, facts)
        try:
            back = read_adapter(draft, transformer)  # its hash is checked against the record
        except UserError as error:
            raise ExportError(f"{file} written as {format} does not read back ({error}); report this") from error
        stock, note = _read_by_diffusers(draft, back, format, names)
        with disk_errors(file):
            for part in sorted(trial.iterdir(), key=lambda part: part.name == file.name):  # the weights go last
                fsync_path(part)
                os.replace(part, file.with_name(part.name))
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    largest = max(a.shape[0] for a, _ in layers.values())
    lost, empty = distance(adapter, written), not any(a.any() and b.any() for a, b in adapter.tensors.values())
    return ExportedFile(file, len(layers), largest, lost, stock, note, empty)


def _adapter_of(layers: Mapping[str, Pair], names: ArchitectureNames | None, sizes: Sizes) -> Adapter:
    """The adapter that is read from the layers of a file."""
    if names is None:
        return Adapter(dict(layers))
    parts = [names.split(layer, a.float(), b.float(), sizes) for layer, (a, b) in layers.items()]
    return Adapter({module: pair for found in parts for module, pair in found.items()})


def naming(names: ArchitectureNames | None, format: str, transformer: nn.Module) -> str:
    """Whose Linears a format names, "original" or "diffusers"; UserError when that is not known."""
    if format in ("diffusers", "peft"):
        return "diffusers"
    if names is None:
        raise UserError(
            f"how {format} names the layers of a {type(transformer).__name__} is not known here; export it as "
            "diffusers or peft"
        )
    return names.comfyui if format == "comfyui" else names.kohya


def distance(adapter: Adapter, other: Adapter) -> float:
    """‖Δ − Δ'‖ / ‖Δ‖ over all modules together, Frobenius; a module of only one of them counts whole."""
    gap, whole, minus = 0.0, 0.0, scaled(other, -1.0)
    for name in adapter.tensors.keys() | other.tensors.keys():
        pairs = [adapter.tensors.get(name), minus.tensors.get(name)]
        held = [pair for pair in pairs if pair is not None]
        a, b = torch.cat([a for a, _ in held]), torch.cat([b for _, b in held], dim=1)
        gap += truncate_product(a, b, a.shape[0])[2]
        if pairs[0] is not None:
            whole += truncate_product(*pairs[0], pairs[0][0].shape[0])[2]
    return (gap / whole) ** 0.5 if whole else float(gap > 0)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().cpu().to(dtype).contiguous()


def _write(
    file: Path,
    layers: Mapping[str, Pair],
    format: str,
    names: ArchitectureNames | None,
    record: Mapping[str, Any],
) -> None:
    """Write the tensors under the format's keys, and PEFT's configuration; equal adapters give equal bytes."""
    from safetensors.torch import save_file

    halves = {"kohya": ("lora_down", "lora_up"), "comfyui": names.halves if names else ("lora_A", "lora_B")}
    down, up = halves.get(format, ("lora_A", "lora_B"))
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in sorted(layers.items()):
        stem = {
            "diffusers": stock_name(layer),
            "peft": f"base_model.model.{layer}",
            "comfyui": f"diffusion_model.{layer}",
            "kohya": f"lora_unet_{layer.replace('.', '_')}",
        }[format]
        tensors |= {f"{stem}.{down}.weight": a.clone(), f"{stem}.{up}.weight": b.clone()}
        if format == "kohya":
            tensors[f"{stem}.alpha"] = torch.tensor(float(a.shape[0]))  # bf16 cannot hold every rank
    if format == "peft":
        _peft_config(layers, record).save_pretrained(str(file.parent))
    with disk_errors(file):
        save_file(tensors, file, {METADATA_KEY: json.dumps(record, sort_keys=True)})


def _peft_config(layers: Mapping[str, Pair], record: Mapping[str, Any]) -> Any:
    """The LoraConfig for `PeftModel.from_pretrained`: every layer by its whole name, of one rank."""
    from peft import LoraConfig

    rank = max(a.shape[0] for a, _ in layers.values())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        base_model_name_or_path=record.get("base"),
        inference_mode=True,
    )


def _read_by_diffusers(
    file: Path, back: Adapter, format: str, names: ArchitectureNames | None
) -> tuple[bool | None, str]:
    """Whether diffusers' converter reads the adapter `back` from the file, and why not.

    None without a converter for this format; ExportError when it reads another adapter.
    """
    if names is None or format not in names.stock:
        return None, ""
    from diffusers import loaders

    loader: Any = getattr(loaders, names.loader, None) or getattr(loaders.lora_pipeline, names.loader)
    try:
        state = loader.lora_state_dict(str(file.parent), weight_name=file.name)
    except Exception as error:  # each converter fails in its own way
        return False, " ".join(str(error).split())[:120] or type(error).__name__
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, part = split_key(key) or (key, "?")
        halves.setdefault(layer, {})[part] = tensor.float()
    known = ("transformer.", PREFIX)
    odd = [layer for layer, parts in halves.items() if not layer.startswith(known) or parts.keys() != {*"AB"}]
    if odd:
        return False, f"it makes {few(odd)} of it"
    found = Adapter({n.removeprefix("transformer."): (parts["A"], parts["B"]) for n, parts in halves.items()})
    differ = [name for name in back.tensors.keys() | found.tensors.keys() if _gap(name, back, found) > 1e-5]
    lacking = [name for name in differ if name not in found.tensors]
    strange = [name for name in differ if name not in back.tensors]
    if lacking or strange:
        return False, f"it leaves out {few(lacking)}" if lacking else f"it makes {few(strange)} of it"
    if differ and all(names.misread and names.is_exchanged(name, *_size(back, name)) for name in differ):
        return False, f"it exchanges scale and shift of {few(differ)}"
    if differ:
        raise ExportError(
            f"stock diffusers reads another adapter from {file.name} than was written as {format} "
            f"({distance(back, found):.1%} apart); report this with your diffusers version"
        )
    return True, ""


def _gap(name: str, *adapters: Adapter) -> float:
    """`distance` of two adapters in one module."""
    first, second = (Adapter({k: v for k, v in one.tensors.items() if k == name}) for one in adapters)
    return distance(first, second)


def _size(adapter: Adapter, name: str) -> tuple[int, int]:
    a, b = adapter.tensors[name]
    return a.shape[1], b.shape[0]
