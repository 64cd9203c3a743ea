"""Tables of the original models' names for their Linears, one for each architecture; reading and exporting share them.

ComfyUI, kohya and musubi keep the original names. Where diffusers has q, k and v apart, the original has one Linear
that stacks their rows: `join` writes such a pair exactly (block-diagonal, so ranks add; or with the A they share),
`split` reads it back and drops the columns that are zero for a part, which undoes the join. Where a modulation gives
shift and scale in the original and scale and shift in diffusers, both exchange the two halves of its rows. A layer
that is in no table is not guessed: it stays unmatched, or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from danceopd.errors import UserError

Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Sizes = Mapping[str, tuple[int, int]]  # module path -> (in, out)
Stacks = dict[str, tuple[str, ...]]  # original Linear -> diffusers modules, rows in this order; {}: block number
Naming = Literal["original", "diffusers"]


@dataclass(frozen=True)
class ArchitectureNames:
    """One architecture: its transformer and LoRA loader in diffusers, and the names that other tools use."""

    transformer: str  # diffusers class
    pipelines: str  # a pattern for the beginning of its pipeline classes' names
    loader: str  # the mixin of diffusers.loaders whose converters `load_lora_weights` uses
    stock: tuple[str, ...]  # the formats that this loader reads
    stacked: Stacks
    aliases: Stacks = field(default_factory=dict)  # other names that are read, and never written
    exchanged: tuple[str, ...] = ()  # diffusers modules with (scale, shift) where the original has (shift, scale)
    misread: bool = False  # stock's LoRA loader forgets to exchange them
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

    def is_exchanged(self, module: str, into: int, out: int) -> bool:
        """Whether a diffusers module of this size has the halves of its rows in the other order than the original.

        A modulation with gates (more than two parts) has the same order in both.
        """
        return out == 2 * into and any(pattern.fullmatch(module) for pattern in self._exchanged)

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
                    f"it as diffusers or peft, or leave it out (--leave-out {module})"
                )
            groups[original] = self.modules(original)
        return {
            original: self._reordered(parts[0], tensors[parts[0]]) if len(parts) == 1 else _stack(parts, tensors, sizes)
            for original, parts in groups.items()
        }

    def split(self, original: str, a: Tensor, b: Tensor, sizes: Sizes | None) -> dict[str, Pair]:
        """An original Linear's A and B -> diffusers modules; {} when the model lacks one, or the rows do not add up.

        Without `sizes` each part but the last is square. Rows for another size of the model are split in proportion.
        """
        parts = self.modules(original)
        if not parts or (sizes is not None and any(part not in sizes for part in parts)):
            return {}
        if len(parts) == 1:
            return {parts[0]: self._reordered(parts[0], (a, b))}
        if sizes is None:
            heights = [a.shape[1]] * (len(parts) - 1)
            heights.append(b.shape[0] - sum(heights))
        else:
            whole = sum(sizes[part][1] for part in parts)
            heights = [sizes[part][1] * b.shape[0] // whole for part in parts]
        if min(heights) < 1 or sum(heights) != b.shape[0]:
            return {}
        pieces = dict(zip(parts, b.split(heights), strict=True))
        if b.is_meta:  # shapes only
            return {part: (a, rows) for part, rows in pieces.items()}
        found = {}
        for part, rows in pieces.items():
            used = rows.ne(0).any(dim=0)
            if used.any():
                found[part] = (a, rows.contiguous()) if used.all() else (a[used], rows[:, used])
        return found or {part: (a, rows) for part, rows in pieces.items()}

    def _reordered(self, module: str, pair: Pair) -> Pair:
        a, b = pair
        return (a, torch.cat(b.chunk(2)[::-1])) if self.is_exchanged(module, a.shape[1], b.shape[0]) else pair

    def is_own(self, layer: str) -> bool:
        """Whether diffusers itself has a layer of this name."""
        return self.originals(layer) is not None or any(_pattern(same).fullmatch(layer) for same in self.unchanged)

    @cached_property
    def _any(self) -> list[re.Pattern]:
        parts = [part for stack in self.stacked.values() for part in stack]
        return [_pattern(template, flat=True) for template in (*self.stacked, *self.aliases, *parts, *self.unchanged)]

    @cached_property
    def _of_modules(self) -> list[tuple[re.Pattern, str]]:
        return [(_pattern(part), template) for template, parts in self.stacked.items() for part in parts]

    @cached_property
    def _of_originals(self) -> list[tuple[re.Pattern, tuple[str, ...]]]:
        return [(_pattern(template, flat=True), parts) for template, parts in (self.stacked | self.aliases).items()]

    @cached_property
    def _exchanged(self) -> list[re.Pattern]:
        return [_pattern(template) for template in self.exchanged]


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


def _double(mlp: tuple[str, str]) -> Stacks:
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


def _embedders(**renamed: str) -> Stacks:
    """Original embedders of two Linears (such as time_in, with their stem in diffusers), as both FLUX have them."""
    return {
        f"{original}.{layer}": (f"{stem}.linear_{number}",)
        for original, stem in renamed.items()
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    }


_ENDS: Stacks = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""The first and last Linears of both FLUX generations."""


def _joint() -> Stacks:
    """SD3 and SD3.5."""
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
    found["joint_blocks.{}.context_block.adaLN_modulation.1"] = (f"{block}norm1_context.linear",)
    for original, stem in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        found[f"{original}.mlp.0"] = (f"time_text_embed.{stem}.linear_1",)
        found[f"{original}.mlp.2"] = (f"time_text_embed.{stem}.linear_2",)
    same: Stacks = {"context_embedder": ("context_embedder",)}
    return found | same | {original: parts for original, parts in _ENDS.items() if original.startswith("final_layer")}


def _nextdit() -> Stacks:
    """Z-Image; its tables of first and last layers have one entry, for patches of 2 x 2 pixels and one frame."""
    found: Stacks = {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    }
    found |= {same: (same,) for same in ("cap_embedder.1", "siglip_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")}
    for stem in ("layers", "noise_refiner", "context_refiner", "siglip_refiner"):
        block = f"{stem}.{{}}."
        found[f"{block}attention.qkv"] = tuple(f"{block}attention.to_{part}" for part in "qkv")
        found[f"{block}attention.out"] = (f"{block}attention.to_out.0",)
        for same in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
            found[f"{block}{same}"] = (f"{block}{same}",)
    return found


def _krea2() -> Stacks:
    parts = {f"attn.w{one}": f"attn.to_{one}" for one in "qkv"}
    parts |= {"attn.wo": "attn.to_out.0", "attn.gate": "attn.to_gate"}
    parts |= {f"mlp.{one}": f"ff.{one}" for one in ("gate", "up", "down")}
    stems = {"blocks": "transformer_blocks"}
    stems |= {f"txtfusion.{kind}_blocks": f"text_fusion.{kind}_blocks" for kind in ("layerwise", "refiner")}
    found: Stacks = {f"{o}.{{}}.{a}": (f"{d}.{{}}.{b}",) for o, d in stems.items() for a, b in parts.items()}
    ends = {"first": "img_in", "last.linear": "final_layer.linear", "tproj.1": "time_mod_proj"}
    ends |= {f"tmlp.{2 * i}": f"time_embed.linear_{i + 1}" for i in range(2)}
    ends |= {f"txtmlp.{2 * i + 1}": f"txt_in.linear_{i + 1}" for i in range(2)}
    ends["txtfusion.projector"] = "text_fusion.projector"
    return found | {original: (module,) for original, module in ends.items()}


def _wan() -> Stacks:
    parts = {f"{o}_attn.{a}": f"{d}.to_{a}" for o, d in (("self", "attn1"), ("cross", "attn2")) for a in "qkv"}
    parts |= {"self_attn.o": "attn1.to_out.0", "cross_attn.o": "attn2.to_out.0"}
    parts |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    found: Stacks = {f"blocks.{{}}.{o}": (f"blocks.{{}}.{d}",) for o, d in parts.items()}
    ends = {f"{e}_embedding.{2 * i}": f"{e}_embedder.linear_{i + 1}" for e in ("time", "text") for i in range(2)}
    ends["time_projection.1"] = "time_proj"
    return found | {o: (f"condition_embedder.{d}",) for o, d in ends.items()} | {"head.head": ("proj_out",)}


def _fused(*attentions: str) -> Stacks:
    """The Linears that diffusers' `fuse_qkv_projections` makes of attentions such as `transformer_blocks.{}.attn`."""
    found: Stacks = {}
    for attn in attentions:
        found[f"{attn}.to_qkv"] = tuple(f"{attn}.to_{part}" for part in "qkv")
        found[f"{attn}.to_added_qkv"] = tuple(f"{attn}.add_{part}_proj" for part in "qkv")
    return found


def _xlabs() -> Stacks:
    """XLabs' names of FLUX.1's attention layers."""
    block, single = "transformer_blocks.{}.attn.", "single_transformer_blocks.{}."
    return {
        "double_blocks.{}.processor.qkv_lora1": tuple(f"{block}to_{part}" for part in "qkv"),
        "double_blocks.{}.processor.qkv_lora2": tuple(f"{block}add_{part}_proj" for part in "qkv"),
        "double_blocks.{}.processor.proj_lora1": (f"{block}to_out.0",),
        "double_blocks.{}.processor.proj_lora2": (f"{block}to_add_out",),
        "single_blocks.{}.processor.qkv_lora": tuple(f"{single}attn.to_{part}" for part in "qkv"),
        "single_blocks.{}.processor.proj_lora": (f"{single}proj_out",),
    }


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
            }
            | _ENDS
            | _embedders(
                time_in="time_guidance_embed.timestep_embedder", guidance_in="time_guidance_embed.guidance_embedder"
            )
            | {
                f"{stem}_stream_modulation{stream}.lin": (f"{stem}_stream_modulation{stream}.linear",)
                for stem, stream in (("double", "_img"), ("double", "_txt"), ("single", ""))
            },
            aliases=_fused("transformer_blocks.{}.attn"),
            exchanged=("norm_out.linear",),
            misread=True,  # also in its LoKr converter; the converter of whole checkpoints is right
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
            }
            | _ENDS
            | _embedders(
                time_in="time_text_embed.timestep_embedder",
                guidance_in="time_text_embed.guidance_embedder",
                vector_in="time_text_embed.text_embedder",
            ),
            aliases=_fused("transformer_blocks.{}.attn", f"{_SINGLE}attn") | _xlabs(),
            exchanged=("norm_out.linear",),
            halves=("lora_down", "lora_up"),
        ),
        ArchitectureNames(
            "QwenImageTransformer2DModel",
            "QwenImage(?!21)",
            "QwenImageLoraLoaderMixin",
            ("diffusers", "comfyui", "kohya"),
            {},
            aliases=_fused("transformer_blocks.{}.attn"),
            comfyui="diffusers",
            kohya="diffusers",
            unchanged=(
                "img_in",
                "txt_in",
                "time_text_embed.timestep_embedder.linear_1",
                "time_text_embed.timestep_embedder.linear_2",
                "norm_out.linear",
                "proj_out",
                *(
                    f"transformer_blocks.{{}}.{part}"
                    for part in (
                        *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
                        *(f"attn.add_{part}_proj" for part in "qkv"),
                        *(f"{stream}_{part}" for stream in ("img", "txt") for part in ("mlp.net.0.proj", "mlp.net.2")),
                        *(f"{stream}_mod.1" for stream in ("img", "txt")),
                    )
                ),
            ),
        ),
        ArchitectureNames(
            "ZImageTransformer2DModel",
            "ZImage",
            "ZImageLoraLoaderMixin",
            ("diffusers", "comfyui", "kohya"),
            _nextdit(),
            aliases=_fused("layers.{}.attention", "noise_refiner.{}.attention", "context_refiner.{}.attention"),
            comfyui="diffusers",
        ),
        ArchitectureNames(
            "Krea2Transformer2DModel", "Krea2", "Krea2LoraLoaderMixin", ("diffusers", "comfyui"), _krea2()
        ),
        ArchitectureNames(
            "WanTransformer3DModel", "Wan", "WanLoraLoaderMixin", ("diffusers", "comfyui", "kohya"), _wan()
        ),
        ArchitectureNames(
            "SD3Transformer2DModel",
            "StableDiffusion3",
            "SD3LoraLoaderMixin",
            ("diffusers",),
            _joint(),
            aliases=_fused("transformer_blocks.{}.attn", "transformer_blocks.{}.attn2"),
            exchanged=("norm_out.linear", "transformer_blocks.{}.norm1_context.linear"),
        ),
    )
}
"""Names by the diffusers class of the transformer."""


def is_original(layer: str) -> bool:
    """Whether a layer's name is an original one in some architecture and diffusers' in none."""
    known = [names for names in ARCHITECTURES.values() if names.has(layer)]
    return bool(known) and not any(names.is_own(layer) for names in known)
