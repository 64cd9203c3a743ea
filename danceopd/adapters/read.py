"""`read_adapter`: a LoRA file of any common dialect goes in, an `Adapter` comes out, or a message that says why not.

An `Adapter` is W + B·A per Linear of the transformer, in fp32 with alpha folded into B, so nothing after it scales
again. Every tensor of the file must match. Headers are read in `header.py`, key names in `dialects.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.dialects import (
    Layer,
    Renamer,
    fold_alpha,
    linear_sizes,
    pipeline_class,
    split_key,
    split_prefix,
)
from danceopd.adapters.header import LoraHeader, check_is_lora, inspect_adapter
from danceopd.adapters.original_names import ARCHITECTURES
from danceopd.common.messages import few
from danceopd.errors import UserError
from danceopd.models.lora import Adapter


def read_adapter(path: str | os.PathLike, transformer: nn.Module | None = None, family: Any = None) -> Adapter:
    """Read a LoRA: a safetensors file, or a folder with `pytorch_lora_weights.safetensors` or only one such file.

    Dialects: diffusers (`transformer.`), PEFT (`base_model.model.`, with its `adapter_config.json`),
    ai-toolkit / ComfyUI (`diffusion_model.`), kohya / musubi (`lora_unet_`), bare module paths. Alpha comes
    from `.alpha` tensors, else from the PEFT configuration in or beside the file, and is folded into B.

    With a `transformer` (on the meta device, if you like) every tensor must belong to a Linear of its size. `family` (a
    Family, its name, or a pipeline class) names the converter for files in the original model's names; with a
    transformer it is found without.

    Returns fp32 tensors on the CPU. UserError for a file that is no LoRA of this model, or is damaged.
    """
    header = inspect_adapter(path)
    file = header.file
    check_is_lora(header)
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
    """`read_adapter` from the header alone: an Adapter on the meta device; the values are not checked."""
    header = inspect_adapter(path)
    check_is_lora(header)
    return Adapter(_rename(header, _layers(header, read=False), transformer, family))


def _layers(header: LoraHeader, read: bool = True) -> list[Layer]:
    """The file's layers in fp32; UserError unless each has A and B of one rank and finite values.

    Without `read` the tensors are on the meta device: shapes only.
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
    header: LoraHeader, layers: list[Layer], transformer: nn.Module | None, family: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layers by the file's names -> tensors by module of the transformer; UserError unless every layer matches."""
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


def _check_record(header: LoraHeader, adapter: Adapter) -> None:
    """UserError when a file that danceopd wrote no longer has the layers and the hash in its metadata."""
    written = header.record.get("modules")
    if written is not None and written != len(adapter):
        raise UserError(
            f"{header.file} was written with {written} layers and holds {len(adapter)}; it was changed "
            "afterwards, write or copy it again"
        )
    if "sha256" in header.record and header.record["sha256"] != adapter.sha256:
        raise UserError(
            f"{header.file} no longer holds the numbers it was written with (their sha256 differs); "
            "it was changed or damaged afterwards, write or copy it again"
        )
