"""Encode a teacher's rows into conditions with the stock pipeline, once, into the cache that runs share.

In: opened data and row numbers. Out: `CachedConditions` (with finished pictures: `CachedTargets`). What a run samples
is a function of its recipe, so its rows are known before a weight is loaded: only they are encoded, then the text
encoders leave memory. Edits are encoded at the size that the stock pipeline gives their source, each size with its own
noise schedule; prompts at the recipe's height and width.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from danceopd.common.cache import cache_folder, cache_key
from danceopd.common.files import sha256
from danceopd.data.dataset import CachedConditions, CachedTargets, Size
from danceopd.data.images import READING, ImageSource, each_source, image_size, open_image
from danceopd.data.sources import Edits, Prompts
from danceopd.data.store import Store, missing
from danceopd.errors import UserError
from danceopd.models.base import file_sha256, pipeline_index
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.editing import EditingPipeline, check_references, editing_pipe, generation_pipe
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import GenerationPipeline, check_prompts

SQUEEZE = 0.06
"""How far, in the logarithm, a target's aspect ratio may be from that of what is drawn: rounding to whole tokens."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5", ".gguf")


def prompts_at_once(device_type: str) -> int:
    """Prompts that a text encoder reads at once: few on a GPU, where the states of all its layers and a causal model's
    logits take 0.3 GB a prompt."""
    return 64 if device_type == "cpu" else 8


def open_pipelines(
    pipe: Any, family: Family, call: dict[str, Any], capabilities: Iterable[str], editing_base: str | None = None
) -> dict[str, GenerationPipeline]:
    """The stock pipelines over one base, by capability; `editing_base` has what an editing pipeline may lack."""
    made: dict[str, GenerationPipeline] = {}
    chunk = prompts_at_once(pipe.device.type)
    for capability in dict.fromkeys(capabilities):
        if capability == "editing":
            made[capability] = EditingPipeline(editing_pipe(pipe, editing_base, family), family, call, chunk)
        else:
            made[capability] = GenerationPipeline(generation_pipe(pipe, family), family, call, chunk)
    return made


class Encoder:
    """Conditions from the cache, or from the stock pipelines where the cache lacks them.

    `pipelines` by capability, `folder` the base's. One text encoder call reads as many prompts of one picture size as
    its pipeline's `chunk`.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        pipelines: Mapping[str, GenerationPipeline],
        editing_base: str | None = None,
        cache: Path | None = None,
    ) -> None:
        self.family, self.pipelines = family, dict(pipelines)
        pipe = next(iter(pipelines.values())).pipe
        bases = [folder, *([Path(editing_base)] if editing_base and Path(editing_base).is_dir() else [])]
        self._facts = [
            *(encoders_fingerprint(base) for base in bases), editing_base, family.name,
            str(pipe.transformer.dtype), pipe.transformer.device.type, diffusers.__version__, transformers.__version__,
        ]  # fmt: skip
        self.store = Store((cache or cache_folder()) / "conditions" / cache_key(*self._facts)[:16])
        self._sized: dict[tuple[Any, ...], GenerationPipeline] = {}

    def sized(self, capability: str, size: Size, steps: int | None = None) -> GenerationPipeline:
        """The pipeline of a capability for another picture size, or another number of steps."""
        pipeline = self.pipelines[capability]
        call = {**pipeline.call, "height": size[0], "width": size[1]}
        call["num_inference_steps"] = steps or call["num_inference_steps"]
        key = capability, size, call["num_inference_steps"]
        if key not in self._sized:
            self._sized[key] = type(pipeline)(pipeline.pipe, self.family, call, pipeline.chunk)
        return self._sized[key]

    def encode(
        self, capability: str, data: Prompts, rows: Iterable[int], steps: int, targets: bool = False
    ) -> CachedConditions:
        """These rows of `data` as conditions, whose schedules have `steps` steps; `targets`: with finished pictures."""
        keys: dict[int, str] = {}
        sizes: dict[int, Size] = {}
        by_size: dict[Hashable, list[int]] = {}
        data.alpha = self.family.alpha
        for row in sorted(set(rows)):
            size, shapes, facts = self._facts_of(capability, data, row)
            keys[row], sizes[row] = cache_key(capability, *facts), size
            by_size.setdefault((size, shapes), []).append(row)
        absent = set(missing(self.store, keys.values(), Condition.from_state))
        with self.store.add() as add:
            for (size, _), group in by_size.items():  # type: ignore[misc]
                new = list({keys[row]: row for row in reversed(group) if keys[row] in absent}.values())[::-1]
                pipeline = self.sized(capability, size)
                for first in range(0, len(new), pipeline.chunk):
                    chunk = new[first : first + pipeline.chunk]
                    found = self._encode(pipeline, data, chunk).to("cpu")
                    for place, row in enumerate(chunk):
                        add(keys[row], found.rows([place]).state())
        made = CachedConditions(self.store, len(data), keys, sizes)
        if targets:
            made = CachedTargets(self.store, len(data), keys, sizes, self._targets(capability, data, sizes))
        made._schedules = {size: self.sized(capability, size, steps).sigmas() for size in set(sizes.values())}
        return made

    def _targets(self, capability: str, data: Prompts, sizes: Mapping[int, Size]) -> dict[int, str]:
        """Where each row's clean latents are in the store, encoded if they were not, a chunk at once."""
        keys: dict[int, str] = {}
        for row, size in sizes.items():
            picture = data.target(row)
            check_target(image_size(picture, data.where(row), data.alpha), size, data.where(row))
            keys[row] = cache_key("clean", capability, _image_hash(picture), size)
        wanted = set(missing(self.store, keys.values(), lambda tensors: tensors["clean"]))
        absent: dict[Size, dict[str, int]] = {}
        for row, key in keys.items():
            if key in wanted:
                absent.setdefault(sizes[row], {})[key] = row
        with self.store.add() as add:
            for size, new in absent.items():
                pipeline, order = self.sized(capability, size), list(new.items())
                for first in range(0, len(order), pipeline.chunk):
                    chunk = order[first : first + pipeline.chunk]
                    clean = pipeline.encode_images(
                        [open_image(data.target(row), data.where(row), alpha=data.alpha) for _, row in chunk]
                    )
                    for (key, _), latents in zip(chunk, clean.cpu(), strict=True):
                        add(key, {"clean": latents})
        return keys

    def _facts_of(self, capability: str, data: Prompts, row: int) -> tuple[Size, tuple[Size, ...], list[Any]]:
        """The row's picture size, its sources' sizes, and what its encoding depends on."""
        call = self.pipelines[capability].call
        fixed = {key: value for key, value in call.items() if key != "num_inference_steps"}
        shapes: tuple[Size, ...]
        if not isinstance(data, Edits):
            size, shapes, prompt, source = (call["height"], call["width"]), (), data[row], None
        else:
            prompt, given = data[row]
            pictures, pipe = each_source(given), self.pipelines[capability].pipe
            check_references(len(pictures), type(pipe).__name__, self.family, data.where(row))
            shapes = tuple(image_size(picture, data.where(row), data.alpha) for picture in pictures)
            size = self.family.edited_size(pipe, shapes, call)
            hashes = [_image_hash(picture) for picture in pictures]
            source = hashes if len(hashes) > 1 else hashes[0]
        return size, shapes, [prompt, source, {**fixed, "height": size[0], "width": size[1]}]

    def _encode(self, pipeline: GenerationPipeline, data: Prompts, rows: list[int]) -> Condition:
        names = [data.where(row) for row in rows]
        if not isinstance(pipeline, EditingPipeline):
            prompts = [data[row] for row in rows]
            check_prompts(pipeline.pipe, pipeline.family, prompts, pipeline.call, names)
            return pipeline.conditions(prompts)
        edits = [data[row] for row in rows]
        check_prompts(pipeline.pipe, pipeline.family, [prompt for prompt, _ in edits], pipeline.call, names, True)
        sources = [
            [open_image(one, name, alpha=data.alpha) for one in each_source(given)]
            for name, (_, given) in zip(names, edits, strict=True)
        ]
        return pipeline.conditions([prompt for prompt, _ in edits], sources)


def check_target(shape: tuple[int, int], size: Size, where: str) -> None:
    """UserError for a target of (width, height) `shape` that would be squeezed into (height, width) `size`."""
    width, height = shape
    if abs(math.log(width * size[0] / (height * size[1]))) > SQUEEZE:
        raise UserError(
            f"{where}: the target is {width}x{height} pixels and would be squeezed into {size[1]}x{size[0]}; crop it "
            "to that shape"
        )


def free_encoders(encoder: Encoder, *pipes: Any) -> None:
    """Free the text encoders, of the GPU too: `encoder`'s pipelines and `pipes` no longer hold them.

    The VAE stays, since sample grids are decoded by it. Pipelines can still make noise, schedules and pictures from
    conditions that they are given.
    """
    every = [*encoder.pipelines.values(), *encoder._sized.values()]
    for pipe in (*pipes, *(d.pipe for d in every), *(d.generation_pipe for d in every)):
        for name in encoder.family.text_components:
            if getattr(pipe, name, None) is not None:
                setattr(pipe, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def park_components(encoder: Encoder) -> None:
    """Move what the pipelines hold besides the transformer to the CPU, when all is encoded.

    `GenerationPipeline.images` takes the VAE to the device for the pictures that it decodes.
    """
    for pipeline in encoder.pipelines.values():
        for pipe in (pipeline.pipe, pipeline.generation_pipe):
            for name, component in pipe.components.items():
                if isinstance(component, torch.nn.Module) and name != "transformer":
                    component.to("cpu")


def encoders_fingerprint(folder: Path) -> str:
    """sha256 over all that turns prompts and images into conditions: every file of the pipeline but the
    transformer's weights."""
    index = pipeline_index(folder)
    parts = sorted(name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir())
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    for part in parts:
        for file in sorted((folder / part).rglob("*")):
            weights = file.suffix in WEIGHTS
            if not file.is_file() or file.name.startswith(".") or weights and part.startswith("transformer"):
                continue
            if not weights or file.suffix == ".safetensors":
                digest.update(f"\n{file.relative_to(folder).as_posix()} {file_sha256(file)}".encode())
    return digest.hexdigest()


def _image_hash(source: ImageSource) -> str:
    """Of an image's content, the bytes of a file or size and pixels, and of how it is read."""
    if isinstance(source, Path):
        return f"{sha256(source)} {READING}"
    content = source if isinstance(source, bytes) else f"{source.mode} {source.size}".encode() + source.tobytes()
    return f"{hashlib.sha256(content).hexdigest()} {READING}"
