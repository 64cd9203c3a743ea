"""Bytes that a forward keeps for its backward through our LoRA layers and through PEFT's, counted without a GPU.

    python benchmarks/activations.py [--side 1024] [--rank 64] [--blocks 5 20]

FLUX.2 klein-4B at its true size on the meta device, bf16, one row: every tensor that autograd saves is counted once,
weights left out; and what the operators of forward and backward move, and their number (a kernel each, in eager mode).
Attention counts as a fused kernel keeps it: queries, keys, values and its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812
import typer
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danceopd.models.backbone import Backbone
from danceopd.pipelines.registry import FAMILIES

KLEIN = FAMILIES["flux2-klein"]
TEXT, HEAD = 512, 128
MOVES_NOTHING = set(
    "view unsqueeze slice transpose permute _unsafe_view split unbind select expand detach alias t reshape as_strided "
    "squeeze chunk split_with_sizes empty new_empty empty_like lift_fresh".split()
)


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Positions(nn.Module):
    """In place of rotary tables, whose values a meta tensor has not."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.new_empty(len(ids), HEAD), ids.new_empty(len(ids), HEAD)


class Operators(TorchDispatchMode):
    """Counts operators that move memory and are no products, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in MOVES_NOTHING and name not in ("mm", "addmm", "addmm_", "bmm"):
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.count += 1
        return out


@contextmanager
def fused_attention() -> Iterator[None]:
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: FusedAttention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def klein(blocks: tuple[int, int]) -> Any:
    """klein-4B's transformer in bf16 on the meta device, with so many blocks of both kinds (all: 5, 20)."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            in_channels=128, attention_head_dim=HEAD, axes_dims_rope=(32,) * 4, rope_theta=2000, guidance_embeds=False,
            num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=24, joint_attention_dim=7680,
        ).to(torch.bfloat16)  # fmt: skip
    transformer.pos_embed = Positions()
    return transformer


def ours(transformer: Any, rank: int) -> None:
    backbone = Backbone(transformer, KLEIN)
    backbone.new_student(rank=rank)
    backbone.acting_as("student").__enter__()


def pefts(transformer: Any, rank: int) -> None:
    """fp32 LoRA layers, as every trainer that calls `inject_adapter_in_model` has them."""
    from peft import LoraConfig, inject_adapter_in_model

    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=KLEIN.lora_targets), transformer)
    for name, module in transformer.named_modules():
        if ".lora_" in name:
            module.float()


def count(transformer: Any, side: int = 1024) -> dict[str, float]:
    """GB that a forward of one row keeps, by dtype and in all; GB and operators of forward and backward."""
    tokens = (side // 16) ** 2
    halves = {"device": "meta", "dtype": torch.bfloat16}
    call = {
        "hidden_states": torch.empty(1, tokens, 128, **halves),
        "encoder_hidden_states": torch.empty(1, TEXT, 7680, **halves), "timestep": torch.empty(1, **halves),
        "img_ids": torch.empty(1, tokens, 4, device="meta"), "txt_ids": torch.empty(1, TEXT, 4, device="meta"),
        "return_dict": False, "guidance": None,
    }  # fmt: skip
    weights = {p.untyped_storage()._cdata for p in transformer.parameters()}
    for module in transformer.modules():
        low = getattr(getattr(module, "active", None), "low", None) or ()
        weights |= {tensor.untyped_storage()._cdata for tensor in low}
    kept, alive = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), str(tensor.dtype).removeprefix("torch.")
            alive.append(tensor)
        return tensor

    with fused_attention(), Operators() as moved:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = transformer(**call)[0]
        out.float().square().sum().backward()
    found: Counter[str] = Counter()
    for size, dtype in kept.values():
        found[dtype] += size
    gb = {f"kept, {dtype}": size / 1e9 for dtype, size in sorted(found.items())}
    return {"kept": found.total() / 1e9, **gb, "moved": moved.bytes / 1e9, "operators": moved.count}


def main(
    side: Annotated[int, typer.Option(help="Pixels a side.")] = 1024,
    rank: Annotated[int, typer.Option(help="Of the student.")] = 64,
    blocks: Annotated[tuple[int, int], typer.Option(help="Double and single blocks.")] = (5, 20),
) -> None:
    """Count both, and print a table."""
    rows = []
    for add in (pefts, ours):
        transformer = klein(blocks)
        add(transformer, rank)
        rows.append(count(transformer, side))
    print(f"| GB, {side} px, rank {rank} | PEFT's layers, fp32 | ours | of PEFT's |\n|---|---|---|---|")
    for key in rows[0] | rows[1]:
        before, after = (row.get(key, 0.0) for row in rows)
        share = f"{after / before:.1%}" if before else ""
        print(f"| {key} | {before:.2f} | {after:.2f} | {share} |")


if __name__ == "__main__":
    typer.run(main)
