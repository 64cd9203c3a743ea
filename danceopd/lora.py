"""LoRA adapters: read every dialect strictly, write one.

An `Adapter` is the plain mathematics, W + B·A per Linear of the transformer, in fp32 with alpha already
folded into B, so nothing downstream ever scales again. `read_adapter` matches N of N tensors or refuses in
one sentence; `write_adapter` leaves a file that stock diffusers loads exactly, without any metadata. Files
and headers are in `lora_file.py`, how files name their layers in `dialects.py`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.dialects import (
    Layer,
    Renamer,
    fold_alpha,
    linear_sizes,
    pipeline_class,
    split_key,
    split_prefix,
)
from danceopd.disk import disk_faults, replace_file
from danceopd.errors import UserError
from danceopd.lora_file import MARK, WEIGHTS, Header, few, inspect_adapter, refuse_foreign
from danceopd.original_names import ARCHITECTURES

__all__ = ["Adapter", "Header", "WEIGHTS", "inspect_adapter", "read_adapter", "write_adapter"]


@dataclass
class Adapter:
    """A LoRA as numbers: module path in the transformer -> (A (r, in), B (out, r)), alpha folded into B.

    fp32; the layer computes `W x + B A x`. Ranks may differ between modules; modules are kept sorted.
    Raises ValueError on shapes that do not multiply.
    """

    tensors: dict[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        for name, (a, b) in self.tensors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"{name}: A {tuple(a.shape)}, B {tuple(b.shape)}: not (r, in) and (out, r)")
        self.tensors = {name: (a.float(), b.float()) for name, (a, b) in sorted(self.tensors.items())}

    def __len__(self) -> int:
        """Modules adapted."""
        return len(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {name: a.shape[0] for name, (a, _) in self.tensors.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 when there is none."""
        return max(self.ranks.values(), default=0)

    @property
    def parameters(self) -> int:
        """Numbers held, A and B together."""
        return sum(a.numel() + b.numel() for a, b in self.tensors.values())

    def delta(self, module: str) -> Tensor:
        """What is added to that module's weight: (out, in), fp32. KeyError for a module not adapted."""
        a, b = self.tensors[module]
        return b @ a

    @property
    def sha256(self) -> str:
        """Hash of names, shapes and fp32 values: the same for one adapter, whatever file it came from."""
        digest = hashlib.sha256()
        for name, pair in self.tensors.items():
            for tensor in pair:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Adapter":
        """A detached copy on that device; `dtype` rounds the values through it (they stay fp32)."""

        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(device, copy=True)
            return tensor if dtype is None else tensor.to(dtype).float()

        return Adapter({name: (move(a), move(b)) for name, (a, b) in self.tensors.items()})


def read_adapter(path: str | os.PathLike, transformer: nn.Module | None = None, family: Any = None) -> Adapter:
    """Read a LoRA: a safetensors file, or a folder with `pytorch_lora_weights.safetensors` or only one.

    Dialects: diffusers (`transformer.`), PEFT (`base_model.model.`, with its `adapter_config.json`),
    ai-toolkit / ComfyUI (`diffusion_model.`), kohya / musubi (`lora_unet_`), bare module paths. Alpha comes
    from `.alpha` tensors, else from the PEFT configuration in or beside the file, and is folded into B.

    `transformer` (the meta device will do) makes it strict: every tensor belongs to a Linear that exists and
    has these sizes. `family` (a Family, its name, or a pipeline class) names the converter for files that use
    the original model's names; with a transformer it is found by itself.

    Returns fp32 tensors on the CPU. Raises UserError with one sentence: what, where, how to mend.
    """
    header = inspect_adapter(path)
    file = header.file
    refuse_foreign(header)
    config = header.peft
    if config and config.get("use_dora"):
        raise UserError(f"{file} is a DoRA by its configuration; train a LoRA without use_dora")
    layers = _layers(header)
    for layer in layers:
        try:
            fold_alpha(layer, config)
        except ValueError as error:
            raise UserError(
                f"{file}: layer {layer.name} cannot be scaled, {error}; save the LoRA again with its "
                "alpha, or with alpha folded into B"
            ) from None
    adapter = Adapter(_rename(header, layers, transformer, family))
    _check_record(header, adapter)
    return adapter


def adapter_shapes(path: str | os.PathLike, transformer: nn.Module | None = None, family: Any = None) -> Adapter:
    """`read_adapter` from the header alone: the same refusals but of values, and an Adapter on the meta device."""
    header = inspect_adapter(path)
    refuse_foreign(header)
    return Adapter(_rename(header, _layers(header, read=False), transformer, family))


def _layers(header: Header, read: bool = True) -> list[Layer]:
    """The file's layers with fp32 tensors, A and B both there, of one rank, finite; UserError otherwise.

    Without `read` they are on the meta device: shapes only.
    """
    from safetensors import SafetensorError, safe_open

    file = header.file
    layers: dict[str, Layer] = {}
    tensors = {key: torch.empty(header.shapes[key], device="meta") for key in sorted(header.shapes)}
    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).float() if read else empty for key, empty in tensors.items()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download or copy it again") from None
    for key, tensor in tensors.items():
        name, part = split_key(key) or ("", "")
        prefix, short = split_prefix(name)
        layer = layers.setdefault(name, Layer(short, prefix))
        if part in layer.parts:
            raise UserError(f"{file} holds layer {name} twice (two adapters in one file?); save only one")
        if part == "alpha" and tensor.numel() != 1:
            raise UserError(f"{file}: {key} is {tuple(tensor.shape)} and not one number; save the LoRA again")
        layer.parts[part] = tensor
    for half, other in (("A", "B"), ("B", "A")):
        bad = [name for name, layer in layers.items() if half in layer.parts and other not in layer.parts]
        if bad:
            raise UserError(
                f"{file} is incomplete: {len(bad)} of {len(layers)} layers have {half} without "
                f"{other} ({few(bad)}); save or download it again"
            )
    bad = [name for name, layer in layers.items() if "A" not in layer.parts]
    if bad:
        raise UserError(
            f"{file} is incomplete: it has an alpha but no matrices for {few(bad)}; save or download it again"
        )
    for name, layer in layers.items():
        a, b = layer.parts["A"], layer.parts["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise UserError(
                f"{file}: A {tuple(a.shape)} and B {tuple(b.shape)} of {name} are not (rank, in) and "
                "(out, rank) of a Linear; train the LoRA on linear layers, or save it again"
            )
    finite = {name: not read or all(t.isfinite().all() for t in layer.parts.values()) for name, layer in layers.items()}
    bad = [name for name in layers if not finite[name]]
    if bad:
        raise UserError(
            f"{file} holds NaN or infinite numbers in {few(bad)}; its training diverged, take an earlier checkpoint"
        )
    return list(layers.values())


def _rename(
    header: Header, layers: list[Layer], transformer: nn.Module | None, family: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layers as the file names them -> modules of the transformer, every one accounted for."""
    file = header.file
    sizes = linear_sizes(transformer) if transformer is not None else None
    model = type(transformer).__name__
    renamer = Renamer(sizes, lambda: pipeline_class(family, transformer), ARCHITECTURES.get(model))
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    unmatched: list[str] = []
    for layer in layers:
        found = renamer(layer)
        if not found:
            unmatched.append(f"{layer.prefix}{layer.name}")
        twice = [name for name in found if name in tensors]
        if twice:
            raise UserError(f"{file} adapts {few(twice)} twice, under two names; save one adapter only")
        tensors.update(found)
    if unmatched and sizes is None:
        raise UserError(
            f"{file} names its layers in the {header.dialect} way ({few(unmatched)}), which cannot be "
            "translated without knowing the model; name its base or its family"
        )
    if unmatched and not tensors:
        raise UserError(
            f"{file} is a LoRA of another architecture: none of its {len(layers)} layers exists in "
            f"{model} ({few(unmatched)}); use the base this LoRA was trained on"
        )
    if unmatched:
        raise UserError(
            f"{file} adapts {len(unmatched)} layers of its {len(layers)} that {model} does not have "
            f"({few(unmatched)}); use the base this LoRA was trained on"
        )
    wrong = [n for n, (a, b) in tensors.items() if sizes and (a.shape[1], b.shape[0]) != sizes[n]]
    if wrong and sizes:
        name = min(wrong)
        (a, b), (into, out) = tensors[name], sizes[name]
        raise UserError(
            f"{file} was made for another size of {model}: {name} maps {a.shape[1]} to {b.shape[0]} in "
            f"the file and {into} to {out} in the model ({len(wrong)} of {len(tensors)} layers differ: "
            f"{few(wrong)}); use the base this LoRA was trained on"
        )
    return tensors


def _check_record(header: Header, adapter: Adapter) -> None:
    """Our own files say how many layers they hold and what these hash to."""
    said = header.record.get("modules")
    if said is not None and said != len(adapter):
        raise UserError(
            f"{header.file} was written with {said} layers and holds {len(adapter)}; it was changed "
            "afterwards, write or copy it again"
        )
    if "sha256" in header.record and header.record["sha256"] != adapter.sha256:
        raise UserError(
            f"{header.file} no longer holds the numbers it was written with (their sha256 differs); "
            "it was changed or damaged afterwards, write or copy it again"
        )


def write_adapter(
    adapter: Adapter,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors`: diffusers keys, alpha folded, right without metadata.

    `metadata` (strings) is kept, beside the number of layers and their sha256, as JSON in the file's one
    metadata entry, `danceopd`: one, because safetensors writes several in random order, and the same adapter
    must be the same bytes. The file appears whole or not at all; an old one stays until then.

    Returns its path. Raises UserError when the disk is full or the folder cannot be written, ValueError for
    an adapter that is empty or not finite in `dtype`.
    """
    from safetensors.torch import save

    if not len(adapter):
        raise ValueError("an adapter without layers is not written")
    if not all(isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise ValueError("metadata holds strings only")
    rounded = adapter.to("cpu", dtype)
    if not all(tensor.isfinite().all() for pair in rounded.tensors.values() for tensor in pair):
        raise ValueError(f"the adapter holds NaN or infinite numbers in {dtype}")
    tensors = {
        f"transformer.{name}.lora_{half}.weight": tensor.to(dtype).contiguous()
        for name, pair in rounded.tensors.items()
        for half, tensor in zip("AB", pair)
    }
    record = {**(metadata or {}), "modules": len(adapter), "sha256": rounded.sha256}
    content = save(tensors, {MARK: json.dumps(record, sort_keys=True)})
    path = Path(folder) / WEIGHTS
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    return path
