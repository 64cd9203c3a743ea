"""Whole forwards without a gradient, for `benchmarks/gpu.py`: of stock transformers, and as a step of a rollout.

A rollout step runs on a backbone with a student LoRA of rank 64: through its LoRA layers, on W + BA, and as a CUDA
graph (`danceopd.models.cuda_graphs`), as in `danceopd merge`. Weights are random, of the models' true shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from danceopd.kernels import install, uninstall
from danceopd.kernels.capture import CudaGraphs
from danceopd.models.backbone import Backbone
from danceopd.models.cuda_graphs import CapturedField
from danceopd.models.fields import AdapterField, MergedField
from danceopd.pipelines.registry import FAMILIES

HEAD = "rollout step, ms | LoRA layers | W + BA | CUDA graph | against W + BA | furthest apart"


def klein(side: int, sources: int, smoke: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import Flux2Transformer2DModel

    tiny = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32}
    full = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    model = Flux2Transformer2DModel(
        in_channels=128,
        attention_head_dim=128,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds=False,
        **(tiny if smoke else full),
    )
    tokens, text = side * side * (1 + sources), 8 if smoke else 512
    ids = torch.zeros(tokens, 4)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // side % side, torch.arange(tokens) % side
    return model, {
        "hidden_states": torch.randn(1, tokens, 128),
        "encoder_hidden_states": torch.randn(1, text, 32 if smoke else 7680),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 4),
    }


def sd35(side: int, sources: int, smoke: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    layers, heads, joint = (2, 1, 32) if smoke else (24, 24, 4096)
    model = SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=joint,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(min(13, layers))),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": torch.randn(1, 16, 2 * side, 2 * side),
        "encoder_hidden_states": torch.randn(1, 8 if smoke else 333, joint),
        "pooled_projections": torch.randn(1, 2048),
        "timestep": torch.tensor([500.0]),
    }


def z_image(side: int, sources: int, smoke: bool) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import ZImageTransformer2DModel

    small = {"dim": 128, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "n_refiner_layers": 1, "cap_feat_dim": 32}
    model = ZImageTransformer2DModel(**(small if smoke else {}))
    return model, {
        "x": [torch.randn(16, 1, 2 * side, 2 * side)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(32 if smoke else 224, 32 if smoke else 2560)],
    }


def forwards(bench: Any, sizes: Sequence[int], smoke: bool) -> None:
    """Milliseconds of a no-gradient forward: eager, compiled blocks, fused, fused in a CUDA graph.

    Blocks are compiled for the largest size without a source only: compiling takes longer than all else together.
    """
    models = [(sd35, "SD3.5-M", 0), (klein, "klein-4B", 0), (z_image, "Z-Image", 0), (klein, "klein-4B", 1)]
    plan = [(*models[0], sizes[0]), *((*model, size) for size in sizes[::-1] for model in models)]
    for make, name, sources, size in dict.fromkeys(plan):
        if bench.late:
            return
        label = f"{name} {size} px" + (" + source" if sources else "")
        compiles = not smoke and not sources and size == sizes[-1]
        given = bench, make, name, size, sources, label, compiles, smoke
        bench.attempt(label, lambda given=given: one_forward(*given))
        bench.release()


def one_forward(
    bench: Any, make: Any, name: str, size: int, sources: int, label: str, compiles: bool, smoke: bool
) -> list[str]:
    model, call = on_device(bench, make, size, sources, smoke)
    if name == "Z-Image" and bench.device != "cpu":
        model.rope_embedder.freqs_cis = None
    bench.rows.append([label, "no-gradient forward, ms", *forward_times(bench, label, model, call, compiles)])
    Console().print("  ".join(bench.rows[-1]), highlight=False)
    return bench.rows[-1]


@torch.no_grad()
def forward_times(bench: Any, label: str, model: Any, call: dict[str, Any], compiles: bool) -> list[str]:
    def run(_: int = 0) -> Any:
        return model(**call, return_dict=False)[0]

    def compiled_blocks() -> float:
        torch._dynamo.reset()
        model.compile_repeated_blocks()
        try:
            return bench.calls(run)
        finally:
            for module in model.modules():
                module._compiled_call_impl = None

    nan, eager = float("nan"), bench.calls(run)
    install(model)
    fused = bench.calls(run)
    graph = bench.attempt(f"{label}, as a CUDA graph", lambda: bench.graph(run, 1)) or nan
    uninstall(model)
    compiled = (bench.attempt(f"{label}, compiled", compiled_blocks) if compiles and not bench.late else None) or nan
    times = [f"{1e3 * t:.2f}" if t == t else "" for t in (eager, compiled, fused, graph)]
    best = min(t for t in (fused, graph) if t == t)
    return [*times, f"{eager / best:.2f}x", f"{compiled / best:.2f}x" if compiled == compiled else "", ""]


def on_device(bench: Any, make: Any, size: int, sources: int, smoke: bool) -> tuple[Any, dict[str, Any]]:
    """A model in bf16 and its call; positions stay fp32."""
    with torch.device(bench.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model, call = make(size // 16, sources, smoke)
        finally:
            torch.set_default_dtype(before)
    model = model.to(bench.device, torch.bfloat16).eval().requires_grad_(False)
    return model, {key: value.float() if key.endswith("ids") else value for key, value in call.items()}


def rollout_steps(bench: Any, sizes: Sequence[int], smoke: bool) -> None:
    """Milliseconds of a step for 1 and 4 rows, with the fused kernels: LoRA layers, W + BA, CUDA graph."""
    for size in sizes:
        for make, name in ((sd35, "sd3"), (klein, "flux2-klein"), (z_image, "z-image")):
            if bench.late:
                return
            given = bench, make, name, size, smoke
            bench.attempt(f"a step of {name}, {size} px", lambda given=given: one_rollout_step(*given))
            bench.release()


def one_rollout_step(bench: Any, make: Any, name: str, size: int, smoke: bool) -> list[str]:
    model, call = on_device(bench, make, size, 0, smoke)
    if name == "z-image":
        model.rope_embedder.freqs_cis = None
    if name == "flux2-klein":
        call = {key: value[None] if key.endswith("ids") else value for key, value in call.items()}
        call["guidance"] = None
    x, condition = FAMILIES[name].split(call)
    backbone = Backbone(model, FAMILIES[name])
    backbone.new_student("student", rank=64)
    install(model)
    for rows in (1, 4):
        many = condition.rows([0] * rows)
        inputs = x.float().repeat(rows, *[1] * (x.ndim - 1)), torch.full((rows,), 0.5, device=bench.device)
        cells = [f"{name} {size} px, {rows} rows", *step(bench, backbone, inputs, many)]
        bench.rollout_steps.append(f"| {' | '.join(cells)} |")
        Console().print(bench.rollout_steps[-1], highlight=False, markup=False)
    return bench.rollout_steps


def step(bench: Any, backbone: Backbone, inputs: Any, condition: Any) -> list[str]:
    merged = MergedField(backbone, "student")
    fields: list[Any] = [AdapterField(backbone, "student"), merged]
    if bench.device != "cpu":
        fields.append(CapturedField(merged, CudaGraphs(torch.device(bench.device, 0)), min_calls=1))
    times = [bench.calls(lambda field=field: field(*inputs, condition)) for field in fields]
    if len(fields) < 3 or not fields[2].graph_count:  # no graphs here, or this forward was refused, which the log says
        return [*(f"{1e3 * t:.2f}" for t in times[:2]), "", "", ""]
    apart = float((fields[2](*inputs, condition) - merged(*inputs, condition)).abs().max())
    return [*(f"{1e3 * t:.2f}" for t in times), f"{times[1] / times[2]:.2f}x", f"{apart:.1e}"]
