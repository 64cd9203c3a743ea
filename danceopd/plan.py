"""What a merge would take, before it takes it: every check, memory and time by part, no weight loaded.

Configurations and safetensors headers say all that is needed: the transformer stands on the meta device, the stock
pipeline is put together without weights to say schedules and picture sizes, and the updates' draws are a function of
the recipe. Times divide FLOPs by the speed of a plain matrix product on this machine, so they are a lower bound.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor, nn

from danceopd.adapters.header import is_checkpoint
from danceopd.adapters.read import adapter_shapes
from danceopd.common.cache import cache_folder
from danceopd.common.system import resolve_device
from danceopd.common.tensors import DTYPES
from danceopd.data.dataset import Size, TeacherData, open_datasets
from danceopd.data.sources import Edits
from danceopd.engine.query import draw_queries, place
from danceopd.errors import UserError
from danceopd.labelfree.contrast import contrast_forwards
from danceopd.labelfree.gates.cost import gate_forwards
from danceopd.labelfree.gates.variants import with_variants
from danceopd.models.base import base_folder, empty_transformer, pipeline_call, pipeline_index
from danceopd.models.checkpoint import open_checkpoint, scheduler_difference
from danceopd.models.cuda_graphs import MAX_GRAPHS
from danceopd.models.flops import TokenCounts, forward_flops
from danceopd.models.lora import Adapter
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import empty_module
from danceopd.pipelines.registry import class_name, family_of
from danceopd.plan_memory import memory as memory_of
from danceopd.plan_memory import numbers, student_modules
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe
from danceopd.run.directory import check_directory
from danceopd.run.validation import forwards

LOOKED, COUNTED, DRAWN = 256, 1000, 10**6  # source images that sizes are read from; updates, queries that are counted
BINS = 10


def plan(recipe: Recipe, tflops: float | None = None) -> dict[str, Any]:
    """Facts of the merge that `recipe` describes, plain data: see `danceopd.cli.plan`.

    `tflops` is the speed to assume; None: measured here for a second. UserError for all that a merge would
    refuse, but for damaged numbers inside weight files.
    """
    check_directory(recipe.output, recipe)
    folder = base_folder(recipe.base)
    family, transformer = family_of(folder, recipe.family), empty_transformer(folder)
    call = pipeline_call(folder, recipe.call, family)
    teachers = {t.name: _teacher(t, folder, transformer) for t in recipe.teachers}
    datasets = with_variants(
        recipe.gates, recipe.sampling, recipe.rollout.steps, recipe.teachers, open_datasets(recipe)
    )
    device = resolve_device(recipe.device)
    pipe = _pipeline(folder, family, transformer)
    pictures = _pictures(recipe, datasets, pipe, family, call, transformer)
    sigmas = {size: _sigmas(pipe, family, call, size, recipe.rollout.steps) for size in {p["size"] for p in pictures}}
    queries = _queries(recipe, sigmas, pictures)
    modules = student_modules(recipe, teachers, transformer, family)
    memory = memory_of(recipe, folder, family, transformer, teachers, modules, pictures)
    load = DTYPES[recipe.dtype]
    if tflops is not None and not 0 < tflops < float("inf"):
        raise UserError(f"the speed is {tflops:g} TFLOP/s; give a number above 0, or leave it out to measure it")
    speed = tflops or measure(device, dtype=load)
    passes = _passes(recipe, queries["depth"])
    flops = {c: sum(p["share"] * p["flops"] for p in pictures if p["capability"] == c) for c in capabilities_of(recipe)}
    shares = recipe.shares()
    row = sum(shares[t.name] * flops[t.capability] for t in recipe.teachers)
    total = {part: recipe.batch * count * row for part, count in passes.items()}
    for part, counts in gate_forwards(recipe, datasets, queries["depths"]).items():
        passes[part] = sum(shares[t.name] * counts[t.name] for t in recipe.teachers)
        total[part] = recipe.batch * sum(shares[t.name] * counts[t.name] * flops[t.capability] for t in recipe.teachers)
    if references := contrast_forwards(recipe):
        queries_a_row = passes["student, forward"]
        passes["contrast"] = queries_a_row * sum(shares[t.name] * references[t.name] for t in recipe.teachers)
        total["contrast"] = recipe.batch * queries_a_row * sum(
            shares[t.name] * references[t.name] * flops[t.capability] for t in recipe.teachers
        )
    if recipe.validation.every:
        passes["validation"] = forwards(recipe, sigmas[pictures[0]["size"]]) / (recipe.steps * recipe.batch)
        total["validation"] = recipe.batch * passes["validation"] * sum(flops.values()) / len(flops)
    disk = _disk(recipe, datasets, pictures, transformer, modules)
    here = _machine_memory(device)
    times = ("encoding", "training", "checkpointed")
    peak = {key: sum(m["bytes"] for m in memory if key in m["when"]) for key in times}
    return {
        "base": str(recipe.base), "family": family.name, "transformer": type(transformer).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()), "dtype": str(load).removeprefix("torch."),
        "device": str(device), "objective": recipe.objective, "steps": recipe.steps, "batch": recipe.batch,
        "teachers": [
            {**teachers[t.name][0], "share": shares[t.name], "source": recipe.data_source(t),
             "columns": datasets[t.name].data.roles,
             "rows": len(datasets[t.name].data), "drawn": len(datasets[t.name].rows)}
            for t in recipe.teachers
        ],
        "student": {"rank": recipe.student.rank, "modules": len(modules), "parameters": numbers(recipe, modules)},
        "pictures": pictures, "queries": queries, "memory": memory, "peak": peak, "machine_memory": here,
        "passes": passes, "flops": total, "tflops": speed,
        "seconds": {part: flop / speed / 1e12 for part, flop in total.items()},
        "total_seconds": recipe.steps * sum(total.values()) / speed / 1e12,
        "disk": disk, "warnings": _warnings(recipe, peak, here, disk, device),
        "notes": _notes(recipe, device),
    }  # fmt: skip


def capabilities_of(recipe: Recipe) -> list[str]:
    """The capabilities that the recipe's teachers have."""
    return list(dict.fromkeys(t.capability for t in recipe.teachers))


# -- checks -----------------------------------------------------------------------------------------------


def _teacher(teacher: Teacher, folder: Path, transformer: nn.Module) -> tuple[dict[str, Any], Adapter | None]:
    """What one teacher is and the shapes of its adapter, by its headers."""
    facts: dict[str, Any] = {"name": teacher.name, "adapter": teacher.adapter, "guidance": teacher.guidance}
    if teacher.adapter == "base":
        return {**facts, "kind": "base", "rank": 0, "parameters": 0}, None
    if not is_checkpoint(teacher.adapter):
        adapter = adapter_shapes(teacher.adapter, transformer)
        return {**facts, "kind": "lora", "rank": adapter.rank, "parameters": adapter.parameters}, adapter
    start = open_checkpoint(folder)
    odd = scheduler_difference(start, open_checkpoint(teacher.adapter, like=start))
    if odd and "scheduler" not in teacher.accept:
        raise UserError(
            f"teacher {teacher.name!r} ({teacher.adapter}) was made for another scheduler than the base: {odd}; use a "
            "teacher with the base's scheduler, or `accept: [scheduler]` on the teacher"
        )
    sizes = {path: m for path, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    rank = teacher.rank
    tensors = {
        path: (torch.empty(r, m.in_features, device="meta"), torch.empty(m.out_features, r, device="meta"))
        for path, m in sizes.items()
        if (r := min(rank, m.in_features, m.out_features))
    }
    adapter = Adapter(tensors)
    return {**facts, "kind": "whole model", "rank": rank, "parameters": adapter.parameters}, adapter


# -- pictures ---------------------------------------------------------------------------------------------


def _pipeline(folder: Path, family: Family, transformer: nn.Module) -> Any:
    """The stock generation pipeline without a weight: its models are their configurations."""
    import diffusers

    index = pipeline_index(folder)
    kind = getattr(diffusers, family.generation)
    needed, settings = kind._get_signature_keys(kind)
    parts: dict[str, Any] = dict.fromkeys(needed)
    parts["transformer"] = empty_module(transformer, torch.empty(0))
    parts["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    with torch.device("meta"):
        vae = getattr(diffusers, index["vae"][1])
        parts["vae"] = empty_module(vae.from_config(vae.load_config(folder / "vae")), torch.empty(0, device="cpu"))
    same = class_name(folder) == family.generation
    return kind(**parts, **({key: index[key] for key in settings if key in index} if same else {}))


def _sized(pipe: Any, family: Family, call: dict[str, Any], size: Size, steps: int) -> GenerationPipeline:
    return GenerationPipeline(pipe, family, {**call, "height": size[0], "width": size[1], "steps": steps})


def _sigmas(pipe: Any, family: Family, call: dict[str, Any], size: Size, steps: int) -> Tensor:
    return _sized(pipe, family, call, size, steps).sigmas()


def _pictures(
    recipe: Recipe, datasets: Mapping[str, TeacherData], pipe: Any, family: Family, call: dict[str, Any],
    transformer: nn.Module,
) -> list[dict[str, Any]]:  # fmt: skip
    """Picture sizes by capability with their share, tokens, and FLOPs of one forward."""
    found: dict[str, Counter[Size]] = {}
    settings = {key: value for key, value in call.items() if key != "steps"}
    for teacher in recipe.teachers:
        sizes = found.setdefault(teacher.capability, Counter())
        mine = datasets[teacher.name]
        if isinstance(mine.data, Edits):
            for row in mine.rows[:: max(1, len(mine.rows) // LOOKED)]:
                image = Image.new("1", mine.data.size(row))
                sizes[family.size_of(pipe, image, settings)] += 1
        else:
            sizes[call["height"], call["width"]] += 1
    side = 2 * pipe.vae_scale_factor
    pictures = []
    for capability, sizes in found.items():
        for size, count in sizes.most_common():
            tokens = (size[0] // side) * (size[1] // side)
            one = TokenCounts(tokens, tokens if capability == "editing" else 0, call.get("max_sequence_length") or 512)
            pictures.append(
                {"capability": capability, "size": size, "share": count / sizes.total(), "picture": one.image,
                 "source": one.source, "text": one.text, "flops": forward_flops(transformer, one)}
            )  # fmt: skip
    return pictures


def _queries(recipe: Recipe, sigmas: Mapping[Size, Tensor], pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """How deep the rollouts go, on the commonest picture size, and the share of queries in each tenth of noise."""
    if recipe.objective in ("offpolicy", "supervised"):
        return {"depth": 0.0, "levels": [], "depths": []}
    schedule, query = sigmas[pictures[0]["size"]], recipe.query
    if recipe.objective in ("diffusionopd", "flowopd"):
        levels, depths = schedule[:-1], []
        mean_depth = float(len(levels) - (recipe.objective == "diffusionopd"))
    else:
        drawn = [draw_queries(recipe.seed, s, recipe.batch, query.count, query.law, query.beta)
                 for s in range(max(1, min(recipe.steps, COUNTED, DRAWN // (recipe.batch * query.count))))]  # fmt: skip
        stops, levels = place(torch.cat(drawn), schedule, query.law, query.jitter)
        depth = stops.max(1).values
        mean_depth, depths = float(depth.double().mean()), (torch.bincount(depth) / len(depth)).tolist()
    counts = torch.histc(levels.flatten().float(), BINS, 0.0, 1.0)
    return {"depth": mean_depth, "levels": (counts / counts.sum()).tolist(), "depths": depths}


def _passes(recipe: Recipe, depth: float) -> dict[str, float]:
    """Forwards of one row in an update, by part; a backward counts as one more (frozen weights need no gradient)."""
    steps, shares = recipe.rollout.steps, recipe.shares()
    states = {"danceopd": recipe.query.count, "offpolicy": recipe.query.count, "supervised": recipe.query.count}
    queries = states.get(recipe.objective, steps)
    unconditional = recipe.guidance.unconditional
    calls = {t.name: 1.0 + (0 if t.guidance is None else 1 - unconditional) for t in recipe.teachers}
    teacher = sum(shares[n] * c for n, c in calls.items())
    drawn = steps if recipe.objective == "offpolicy" and recipe.offpolicy.clean == "teacher" else 0
    every, monitor = recipe.monitor.interval(recipe.gates.on), recipe.monitor
    mean = sum(calls.values()) / len(calls)
    monitored = {"monitor": monitor.forwards(steps, mean) / (every * recipe.batch)} if every else {}
    return {
        "rollout": depth * (1 if recipe.rollout.guidance == 1 else 2),
        "teachers": (drawn + (0 if recipe.objective == "supervised" else queries)) * teacher,
        "student, forward": float(queries),
        "student, backward": float(queries),
        **monitored,
    }


# -- disk -------------------------------------------------------------------------------------------------


def _disk(
    recipe: Recipe, datasets: Mapping[str, TeacherData], pictures: list[dict[str, Any]], transformer: Any,
    modules: Mapping[str, nn.Linear],
) -> dict[str, int]:  # fmt: skip
    """Bytes: the run folder at its fullest, the cache at most (nothing of it encoded before), and what is free."""
    config = transformer.config
    width = int(config.get("joint_attention_dim") or config.get("cap_feat_dim") or 0)
    channels = int(config.get("in_channels") or 64)
    rows = {
        (recipe.data_source(t), t.capability): len(a.rows) + sum(len(variant[1]) for variant in a.variants.values())
        for t in recipe.teachers
        for a in (datasets[t.name],)
    }
    cache, size = 0.0, DTYPES[recipe.dtype].itemsize
    for (_, capability), drawn in rows.items():
        for p in (p for p in pictures if p["capability"] == capability):
            cache += drawn * p["share"] * size * (p["text"] * width + p["source"] * channels)
    student = 4 * numbers(recipe, modules)
    return {
        "run": (recipe.keep_last + 1) * 4 * student + student, "run_free": _free(recipe.output),
        "cache": int(cache), "cache_free": _free(cache_folder()),
    }  # fmt: skip


def _free(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# -- the machine ------------------------------------------------------------------------------------------


def measure(device: torch.device, seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """TFLOP/s of a plain matrix product in the dtype that a merge computes in."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    (a @ b).sum().item()
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        (a @ b)[0, 0].item()
        count += 1
    return 2 * side**3 * count / spent / 1e12


def _machine_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _warnings(
    recipe: Recipe, peak: Mapping[str, int], here: int, disk: Mapping[str, int], device: torch.device
) -> list[str]:
    warnings = []
    if recipe.gradient_checkpointing and peak["checkpointed"] > here:
        it = f"training takes about {gigabytes(peak['checkpointed'])} with gradient checkpointing"
        warnings.append(f"{it} and {device} has {gigabytes(here)}; take a smaller batch, micro_batch, picture or base")
    elif not recipe.gradient_checkpointing and peak["training"] > here:
        help_ = (
            "gradient checkpointing would fit" if peak["checkpointed"] <= here
            else "it does not with gradient checkpointing either: take a smaller batch, micro_batch, picture or base"
        )  # fmt: skip
        it = f"training takes about {gigabytes(peak['training'])}"
        warnings.append(f"{it} and {device} has {gigabytes(here)}; {help_}")
    if peak["encoding"] > here:
        warnings.append(f"encoding takes about {gigabytes(peak['encoding'])} and {device} has {gigabytes(here)}")
    for part in ("run", "cache"):
        if disk[part] > disk[f"{part}_free"]:
            what = f"the run folder {recipe.output}" if part == "run" else "the cache (DANCEOPD_CACHE moves it)"
            free = gigabytes(disk[f"{part}_free"])
            warnings.append(f"{what} needs up to {gigabytes(disk[part])} and {free} are free")
    return warnings


def _notes(recipe: Recipe, device: torch.device) -> list[str]:
    """What the figures leave out."""
    if not (recipe.rollout.cuda_graphs and device.type == "cuda"):
        return []
    return [
        "the memory of the CUDA graphs is not counted: one pool for all, about what the largest forward takes "
        f"without a gradient, and a copy of the inputs for each of at most {MAX_GRAPHS}; one that finds no room is not "
        "recorded, and the log says so"
    ]


def gigabytes(number: float) -> str:
    """A number of bytes in a unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.{1 if number < 100 * size else 0}f} {unit}"
    return f"{number / 1e3:.1f} kB"
