"""`read_adapter`: a LoRA file of any common dialect goes in, an `Adapter` comes out, or a message that says why not.

An `Adapter` is W + B·A per Linear of the transformer, in fp32 with alpha folded into B, so nothing after it scales
again. Every tensor of the file must match. Headers are read in `header.py`, key names in `dialects.py`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.adapters.dialects import (
    Layer,
    Pairs,
    Renamer,
    fold_alpha,
    linear_sizes,
    pipeline_class,
    split_key,
    split_prefix,
)
from danceopd.adapters.header import LoraHeader, check_is_lora, inspect_adapter, without
from danceopd.adapters.original_names import ARCHITECTURES, ArchitectureNames
from danceopd.common.messages import few
from danceopd.errors import UserError
from danceopd.models.lora import Adapter

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGERS = ("I64", "I32", "I16", "U8")  # of an alpha
_log = logging.getLogger("danceopd")


def read_adapter(
    path: str | os.PathLike,
    transformer: nn.Module | None = None,
    family: Any = None,
    drop: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> Adapter:
    """Read a LoRA: a safetensors file, or a folder that holds one (`adapter_file`).

    Dialects: diffusers (`transformer.`), PEFT (`base_model.model.`, with its `adapter_config.json`),
    ai-toolkit / ComfyUI (`diffusion_model.`), kohya / musubi (`lora_unet_`), XLabs, bare module paths. LoKr and LoHa
    become the A and B that they equal. Alpha comes from `.alpha` tensors, else from the PEFT configuration in or beside
    the file, and is folded into B.

    With a `transformer` (on the meta device, if you like) every tensor must belong to a Linear of its size. `family` (a
    Family, its name, or a pipeline class) names the converter for files in the original model's names; with a
    transformer it is found without. `drop` names parts of the file that are not read ("text-encoder"), `leave_out`
    layers, by their name in the file or in the transformer, `*` for anything.

    Returns fp32 tensors on the CPU. UserError for a file that is no LoRA of this model, or is damaged.
    """
    adapter, _ = _read(path, transformer, family, drop=drop, leave_out=leave_out)
    return adapter


def adapter_shapes(
    path: str | os.PathLike, transformer: nn.Module | None = None, family: Any = None, drop: Collection[str] = ()
) -> Adapter:
    """`read_adapter` from the header alone: an Adapter on the meta device; the values are not checked."""
    return _read(path, transformer, family, values=False, drop=drop)[0]


def read_dora(
    path: str | os.PathLike, transformer: nn.Module, drop: Collection[str] = ()
) -> tuple[Adapter, dict[str, Tensor]]:
    """`read_adapter` for a DoRA, too: the adapter, and the magnitudes by module, (out, 1) or (1, in); {} for others."""
    return _read(path, transformer, drop=drop, dora=True)


def check_layers(header: LoraHeader) -> list[Layer]:
    """The layers of a file by its header, on the meta device; UserError for all that a reader without a base refuses.

    A DoRA is refused: it needs its base.
    """
    check_is_lora(header)
    return _scaled(header, values=False)


def _read(
    path: str | os.PathLike,
    transformer: nn.Module | None,
    family: Any = None,
    values: bool = True,
    drop: Collection[str] = (),
    leave_out: Collection[str] = (),
    dora: bool = False,
) -> tuple[Adapter, dict[str, Tensor]]:
    header = without(inspect_adapter(path), tuple(drop))
    check_is_lora(header, dora)
    layers = _scaled(header, values)
    if values and header.assumed:
        _log.warning("%s: its alpha is taken from %s, where stock diffusers does not look", header.file, header.assumed)
    tensors, magnitudes = _rename(header, layers, transformer, family, leave_out)
    adapter = Adapter(_unfilled(header, tensors))
    if not leave_out:
        _check_record(header, adapter, values)
    return adapter, magnitudes


def _scaled(header: LoraHeader, values: bool) -> list[Layer]:
    """The file's layers as A and B in fp32, alpha folded in; on the meta device without `values`."""
    config, layers = header.peft, _layers(header, values)
    for layer in layers:
        try:
            layer.compose()
        except ValueError as error:
            raise UserError(
                f"{header.file}: layer {few([layer.name])} cannot be read, {error}; save or download it again"
            ) from None
        try:
            fold_alpha(layer, config)
        except ValueError as error:
            raise UserError(
                f"{header.file}: layer {few([layer.name])} cannot be scaled, {error}; save the LoRA again with its "
                "alpha, or with alpha folded into B"
            ) from None
    return layers


def _layers(header: LoraHeader, values: bool) -> list[Layer]:
    """The file's layers in fp32; UserError unless each has all its parts, of one rank and with finite values.

    Without `values` the tensors are on the meta device, alphas excepted.
    """
    from safetensors import SafetensorError, safe_open

    file = header.file
    layers: dict[str, Layer] = {}
    tensors: dict[str, Tensor] = {}
    odd = [key for key in header.shapes if not _is_numeric(key, header.dtype_of[key])]
    if odd:
        raise UserError(
            f"{file} holds quantised or other numbers than floats ({header.dtype_of[odd[0]]} in {few(odd)}); save the "
            "LoRA in fp32, fp16 or bf16"
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            for key, shape in sorted(header.shapes.items()):
                wanted = values or (key.endswith(".alpha") and torch.Size(shape).numel() == 1)
                tensors[key] = opened.get_tensor(key).float() if wanted else torch.empty(shape, device="meta")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download or copy it again") from None
    for key, tensor in tensors.items():
        name, part = split_key(key) or ("", "")
        prefix, short = split_prefix(name)
        layer = layers.setdefault(name, Layer(short, prefix))
        if part in layer.parts:
            raise UserError(f"{file} holds layer {few([name])} twice (two adapters in one file?); save only one")
        if part == "alpha" and tensor.numel() != 1:
            given = few([str(tuple(tensor.shape))])
            raise UserError(f"{file}: {few([key])} is {given} and not one number; save the LoRA again")
        layer.parts[part] = tensor
    for half, other in (("A", "B"), ("B", "A")):
        bad = [name for name, layer in layers.items() if half in layer.parts and other not in layer.parts]
        if bad:
            raise UserError(
                f"{file} is incomplete: {len(bad)} of {len(layers)} layers have {half} without "
                f"{other} ({few(bad)}); save or download it again"
            )
    bad = [name for name, layer in layers.items() if not layer.parts.keys() - {"alpha", "magnitude"}]
    if bad:
        raise UserError(
            f"{file} is incomplete: it has an alpha but no matrices for {few(bad)}; save or download it again"
        )
    for name, layer in layers.items():
        if "A" not in layer.parts:
            continue
        a, b = layer.parts["A"], layer.parts["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            first, second = (few([str(tuple(half.shape))]) for half in (a, b))
            raise UserError(
                f"{file}: A {first} and B {second} of {few([name])} are not (rank, in) and (out, rank) of a Linear; "
                "train the LoRA on linear layers, or save it again"
            )
    real = {name: [t for t in layer.parts.values() if not t.is_meta] for name, layer in layers.items()}
    bad = [name for name, held in real.items() if not all(t.isfinite().all() for t in held)]
    if bad:
        raise UserError(
            f"{file} holds NaN or infinite numbers in {few(bad)}; its training diverged, take an earlier checkpoint"
        )
    return list(layers.values())


def _is_numeric(key: str, dtype: str) -> bool:
    return dtype in _FLOATS or (dtype in _INTEGERS and key.endswith(".alpha"))


def _rename(
    header: LoraHeader, layers: list[Layer], transformer: nn.Module | None, family: Any, leave_out: Collection[str]
) -> tuple[Pairs, dict[str, Tensor]]:
    """Layers by the file's names -> (A, B) and magnitudes by module; UserError unless every layer matches."""
    file = header.file
    sizes = linear_sizes(transformer) if transformer is not None else None
    model = type(transformer).__name__
    names = ARCHITECTURES.get(model) if transformer is not None else _names_of(pipeline_class(family, None))
    renamer = Renamer(sizes, lambda: pipeline_class(family, transformer), names)
    tensors: Pairs = {}
    magnitudes: dict[str, Tensor] = {}
    unmatched: list[str] = []
    unused = set(leave_out)
    for layer in layers:
        named = {layer.name, f"{layer.prefix}{layer.name}"}
        if _matches(named, leave_out, unused):
            continue
        found, magnitude = _by_module(file, layer, renamer)
        if not found:
            unmatched.append(f"{layer.prefix}{layer.name}")
        for module in [module for module in found if _matches({module}, leave_out, unused)]:
            del found[module]
        twice = [name for name in found if name in tensors]
        if twice:
            raise UserError(f"{file} adapts {few(twice)} twice, under two names; save one adapter only")
        tensors.update(found)
        magnitudes |= {module: scale for module, scale in magnitude.items() if module in found}
        if names is not None and names.misread and layer.name not in found and not header.record:
            _tell_misread(file, found, names)
    if unused:
        raise UserError(f"{file} has no layer {few(unused)} to leave out; `danceopd inspect FILE --names` lists them")
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
            f"{file} adapts {len(unmatched)} layers of its {len(layers)} that {model} does not have, at least not by "
            f"these names ({few(unmatched)}); use the base this LoRA was trained on, or write it without them "
            "(`danceopd export FILE --base BASE --leave-out LAYER`)"
        )
    if not tensors:
        raise UserError(f"{file} has no layer but those left out; leave out fewer")
    wrong = [n for n, (a, b) in tensors.items() if sizes and (a.shape[1], b.shape[0]) != sizes[n]]
    if wrong and sizes:
        name = min(wrong)
        (a, b), (into, out) = tensors[name], sizes[name]
        raise UserError(
            f"{file} was made for another size of {model}: {name} maps {a.shape[1]} to {b.shape[0]} in "
            f"the file and {into} to {out} in the model ({len(wrong)} of {len(tensors)} layers differ: "
            f"{few(wrong)}); use the base this LoRA was trained on"
        )
    return tensors, magnitudes


def _by_module(file: os.PathLike, layer: Layer, renamer: Renamer) -> tuple[Pairs, dict[str, Tensor]]:
    """A layer as (A, B) by module, and DoRA's magnitudes by module: (out, 1), or (1, in) as old LyCORIS has them."""
    magnitude = layer.parts.get("magnitude")
    if magnitude is None:
        return renamer(layer), {}
    a, b = layer.parts["A"], layer.parts["B"]
    if magnitude.ndim == 2 and tuple(magnitude.shape) == (1, a.shape[1]):
        found = renamer(layer)
        if len(found) > 1:
            raise UserError(
                f"{file} has magnitudes by column for {few([layer.name])}, which is several layers of the model, so "
                "they cannot be told apart; merge it into its base with the tool that trained it, and extract that"
            )
        return found, {module: magnitude.reshape(1, -1) for module in found}
    if magnitude.numel() != b.shape[0] or not magnitude.all():
        raise UserError(f"{file}: the magnitudes of {layer.name} are zero, or not one for each row; save it again")
    # as one more column of B, the magnitudes go where the rows go
    row, column = torch.ones_like(a[:1]), magnitude.reshape(-1, 1)
    wider = Layer(layer.name, layer.prefix, {"A": torch.cat([a, row]), "B": torch.cat([b, column], dim=1)})
    found = renamer(wider)
    return {m: (a[:-1], b[:, :-1]) for m, (a, b) in found.items()}, {m: b[:, -1:] for m, (_, b) in found.items()}


def _names_of(pipeline: type | None) -> ArchitectureNames | None:
    """The names of the architecture whose pipelines have such a class."""
    if pipeline is None:
        return None
    return next((names for names in ARCHITECTURES.values() if re.match(names.pipelines, pipeline.__name__)), None)


def _matches(names: set[str], patterns: Collection[str], unused: set[str]) -> bool:
    """Whether one of the names matches one of the patterns, which then is used."""
    hits = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
    unused -= hits
    return bool(hits)


def _tell_misread(file: os.PathLike, found: Pairs, names: ArchitectureNames) -> None:
    for module, (a, b) in found.items():
        if names.is_exchanged(module, a.shape[1], b.shape[0]):
            _log.warning(
                "%s: %s is read with scale and shift in the order of diffusers' model; stock load_lora_weights "
                "(diffusers 0.42) exchanges them",
                file, module,
            )  # fmt: skip


def _unfilled(header: LoraHeader, tensors: Pairs) -> Pairs:
    """The layers at the ranks that danceopd recorded, without the zeros that filled them up to one rank (`fill`)."""
    ranks = header.record.get("ranks")
    if not isinstance(ranks, dict):
        return tensors
    found = dict(tensors)
    for name, (a, b) in tensors.items():
        rank = ranks.get(name)
        if isinstance(rank, int) and 0 < rank < a.shape[0] and (a.is_meta or not (a[rank:].any() or b[:, rank:].any())):
            found[name] = a[:rank].contiguous(), b[:, :rank].contiguous()
    return found


def _check_record(header: LoraHeader, adapter: Adapter, values: bool) -> None:
    """UserError when a file that danceopd wrote no longer has the layers and the hash in its metadata."""
    written = header.record.get("modules")
    told = values or header.dialect in ("diffusers", "peft")  # shapes do not tell which parts of a fused layer are zero
    if written is not None and written != len(adapter) and told:
        raise UserError(
            f"{header.file} was written with {few([str(written)])} layers and holds {len(adapter)}; it was changed "
            "afterwards, write or copy it again"
        )
    if values and "sha256" in header.record and header.record["sha256"] != adapter.sha256:
        raise UserError(
            f"{header.file} no longer holds the numbers it was written with (their sha256 differs); "
            "it was changed or damaged afterwards, write or copy it again"
        )
