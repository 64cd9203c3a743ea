"""Tables of the original models' names for the Linears that diffusers renamed or split, one for each architecture.

ComfyUI, kohya and musubi keep the original names. Where diffusers has q, k and v apart, the original has one Linear
that stacks their rows: `join` writes such a pair exactly (block-diagonal, so ranks add; or with the A they share),
`split` reads it back and drops the columns that are zero for a part, which undoes the join. A layer that is in no
table is not guessed: it stays unmatched, or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from danceopd.errors import UserError

Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Sizes = Mapping[str, tuple[int, int]]  # module path -> (in, out)
Naming = Literal["original", "diffusers"]


@dataclass(frozen=True)
class ArchitectureNames:
    """One architecture: its transformer and LoRA loader in diffusers, and the names that other tools use."""

    transformer: str  # diffusers class
    pipelines: str  # a pattern for the beginning of its pipeline classes' names
    loader: str  # the mixin of diffusers.loaders whose converters `load_lora_weights` uses
    stock: tuple[str, ...]  # the formats that this loader reads
    stacked: dict[str, tuple[str, ...]]  # original Linear -> diffusers modules, rows in this order; {}: block number
    comfyui: Naming = "original"
    kohya: Naming = "original"
    halves: tuple[str, str] = ("lora_A", "lora_B")  # in the comfyui format
    unchanged: tuple[str, ...] = ()  # diffusers modules that have the same name in the original

    def originals(self, module: str) -> str | None:
        """The original Linear that holds a diffusers module's rows; None when the table has none."""
        for pattern, template in self._of_modules:
            match = pattern.fullmatch(module)
            if match:
                return template.format(*match.groups())
        return None

    def modules(self, original: str) -> tuple[str, ...]:
        """The diffusers modules stacked in an original Linear; its dots may be flattened to `_`. () when unknown."""
        for pattern, templates in self._of_originals:
            match = pattern.fullmatch(original)
            if match:
                return tuple(template.format(*match.groups()) for template in templates)
        return ()

    def has(self, layer: str) -> bool:
        """Whether a layer of a block has this diffusers or original name, with dots or flattened to `_`."""
        return any(pattern.fullmatch(layer) for pattern in self._any)

    def join(self, tensors: Mapping[str, Pair], sizes: Sizes) -> dict[str, Pair]:
        """Diffusers modules -> original Linears, exactly. A part that is not adapted gets rows of zeros.

        UserError for a module that is not in the table.
        """
        groups: dict[str, tuple[str, ...]] = {}
        for module in tensors:
            original = self.originals(module)
            if original is None:
                raise UserError(
                    f"{module} has no name in the original layout of {self.transformer} that danceopd knows; export "
                    "it as diffusers or peft, or leave that module out"
                )
            groups[original] = self.modules(original)
        return {
            original: tensors[parts[0]] if len(parts) == 1 else _stack(parts, tensors, sizes)
            for original, parts in groups.items()
        }

    def split(self, original: str, a: Tensor, b: Tensor, sizes: Sizes) -> dict[str, Pair]:
        """An original Linear's A and B -> diffusers modules; {} when the name is unknown or the rows do not add up."""
        parts = self.modules(original)
        if not parts or any(part not in sizes for part in parts):
            return {}
        if len(parts) == 1:
            return {parts[0]: (a, b)}
        if sum(sizes[part][1] for part in parts) != b.shape[0]:
            return {}
        found = {}
        for part, rows in zip(parts, b.split([sizes[part][1] for part in parts]), strict=True):
            used = rows.ne(0).any(dim=0)
            if used.any():
                found[part] = (a, rows.contiguous()) if used.all() else (a[used], rows[:, used])
        return found or {part: (a, rows) for part, rows in zip(parts, b.split([sizes[p][1] for p in parts]))}

    @cached_property
    def _any(self) -> list[re.Pattern]:
        parts = [part for stack in self.stacked.values() for part in stack]
        return [_pattern(template, flat=True) for template in (*self.stacked, *parts, *self.unchanged)]

    @cached_property
    def _of_modules(self) -> list[tuple[re.Pattern, str]]:
        return [(_pattern(part), template) for template, parts in self.stacked.items() for part in parts]

    @cached_property
    def _of_originals(self) -> list[tuple[re.Pattern, tuple[str, ...]]]:
        return [(_pattern(template, flat=True), parts) for template, parts in self.stacked.items()]


def _pattern(template: str, flat: bool = False) -> re.Pattern:
    text = re.escape(template).replace(r"\{\}", r"(\d+)")
    return re.compile(text.replace(r"\.", "[._]") if flat else text)


def _stack(parts: tuple[str, ...], tensors: Mapping[str, Pair], sizes: Sizes) -> Pair:
    """One pair that stacks the rows of the parts: with the A they share, or block-diagonal."""
    held = [tensors[part] for part in parts if part in tensors]
    downs = [a for a, _ in held]
    if all(a.shape == downs[0].shape and torch.equal(a, downs[0]) for a in downs):
        rank, rows = downs[0].shape[0], []
        for part in parts:
            rows.append(tensors[part][1] if part in tensors else held[0][1].new_zeros(sizes[part][1], rank))
        return downs[0], torch.cat(rows)
    up = held[0][1].new_zeros(sum(sizes[part][1] for part in parts), sum(a.shape[0] for a in downs))
    row = column = 0
    for part in parts:
        if part in tensors:
            b = tensors[part][1]
            up[row : row + b.shape[0], column : column + b.shape[1]] = b
            column += b.shape[1]
        row += sizes[part][1]
    return torch.cat(downs), up


def _double(mlp: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    """The double-stream blocks of both FLUX generations."""
    block, found = "transformer_blocks.{}.", {}
    for stream, parts, out, ff in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    ):
        found[f"double_blocks.{{}}.{stream}_attn.qkv"] = tuple(f"{block}attn.{part}" for part in parts)
        found[f"double_blocks.{{}}.{stream}_attn.proj"] = (f"{block}attn.{out}",)
        found[f"double_blocks.{{}}.{stream}_mlp.0"] = (f"{block}{ff}.{mlp[0]}",)
        found[f"double_blocks.{{}}.{stream}_mlp.2"] = (f"{block}{ff}.{mlp[1]}",)
    return found


def _joint() -> dict[str, tuple[str, ...]]:
    """The blocks of SD3 and SD3.5."""
    block, found = "transformer_blocks.{}.", {}
    for stream, attention, parts, out in (
        ("x_block", "attn", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0"),
        ("x_block", "attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_out.0"),
        ("context_block", "attn", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out"),
    ):
        found[f"joint_blocks.{{}}.{stream}.{attention}.qkv"] = tuple(f"{block}{part}" for part in parts)
        found[f"joint_blocks.{{}}.{stream}.{attention}.proj"] = (f"{block}{out}",)
    for stream, ff in (("x_block", "ff"), ("context_block", "ff_context")):
        found[f"joint_blocks.{{}}.{stream}.mlp.fc1"] = (f"{block}{ff}.net.0.proj",)
        found[f"joint_blocks.{{}}.{stream}.mlp.fc2"] = (f"{block}{ff}.net.2",)
    found["joint_blocks.{}.x_block.adaLN_modulation.1"] = (f"{block}norm1.linear",)
    return found


def _nextdit() -> dict[str, tuple[str, ...]]:
    """The blocks of Z-Image."""
    found: dict[str, tuple[str, ...]] = {}
    for stem in ("layers", "noise_refiner", "context_refiner"):
        block = f"{stem}.{{}}."
        found[f"{block}attention.qkv"] = tuple(f"{block}attention.to_{part}" for part in "qkv")
        found[f"{block}attention.out"] = (f"{block}attention.to_out.0",)
        for same in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
            found[f"{block}{same}"] = (f"{block}{same}",)
    return found


_SINGLE = "single_transformer_blocks.{}."
ARCHITECTURES: dict[str, ArchitectureNames] = {
    names.transformer: names
    for names in (
        ArchitectureNames(
            "Flux2Transformer2DModel",
            "Flux2",
            "Flux2LoraLoaderMixin",
            ("diffusers", "comfyui", "peft", "kohya"),
            _double(("linear_in", "linear_out"))
            | {
                "single_blocks.{}.linear1": (f"{_SINGLE}attn.to_qkv_mlp_proj",),
                "single_blocks.{}.linear2": (f"{_SINGLE}attn.to_out",),
            },
        ),
        ArchitectureNames(
            "FluxTransformer2DModel",
            "Flux(?!2)",
            "FluxLoraLoaderMixin",
            ("diffusers", "comfyui", "kohya"),
            _double(("net.0.proj", "net.2"))
            | {
                "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
                "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
                "single_blocks.{}.linear1": (
                    *(f"{_SINGLE}attn.to_{part}" for part in "qkv"),
                    f"{_SINGLE}proj_mlp",
                ),
                "single_blocks.{}.linear2": (f"{_SINGLE}proj_out",),
                "single_blocks.{}.modulation.lin": (f"{_SINGLE}norm.linear",),
            },
            halves=("lora_down", "lora_up"),
        ),
        ArchitectureNames(
            "QwenImageTransformer2DModel",
            "QwenImage(?!21)",
            "QwenImageLoraLoaderMixin",
            ("diffusers", "comfyui", "kohya"),
            {},
            comfyui="diffusers",
            kohya="diffusers",
            unchanged=tuple(
                f"transformer_blocks.{{}}.{part}"
                for part in (
                    *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
                    *(f"attn.add_{part}_proj" for part in "qkv"),
                    *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mlp.net.0.proj", "mlp.net.2")),
                    *(f"{stream}_mod.1" for stream in ("img", "txt")),
                )
            ),
        ),
        ArchitectureNames(
            "ZImageTransformer2DModel",
            "ZImage",
            "ZImageLoraLoaderMixin",
            ("diffusers", "comfyui", "kohya"),
            _nextdit(),
            comfyui="diffusers",
        ),
        ArchitectureNames("SD3Transformer2DModel", "StableDiffusion3", "SD3LoraLoaderMixin", ("diffusers",), _joint()),
    )
}
"""Names by the diffusers class of the transformer."""
