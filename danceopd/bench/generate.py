"""Generate the missing images of a bench: every model, the same items, from the same noise.

Items of one image size and token layout are cut into batches once for all models. An item's noise depends on its seed
alone, and its batch is always the same, so neither resuming nor the number of processes changes a bit of an image.
Batches are dealt out to the processes. Each process writes its images, and a line for each into a log of its own; the
main process merges the logs, those that a killed run has left included.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from danceopd.bench.images import ImageStore
from danceopd.bench.lineup import Lineup, Model
from danceopd.bench.suites.protocol import DRIFT, Item
from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, read_lines, write_atomic
from danceopd.data.dataset import CachedConditions, Size
from danceopd.data.encode import Encoder, free_encoders
from danceopd.data.images import flattened, open_image, picture
from danceopd.data.sources import Edits, Prompts

if TYPE_CHECKING:
    from danceopd.bench.host import ModelHost

BATCH, BATCH_PIXELS = 64, 64 * 256 * 256
"""A batch has at most so many images, and at most so many pixels."""
Progress = Callable[[int, int, str], None]
Generated = dict[tuple[str, str], str]
"""(model, item id) -> sha256 of the image's pixels."""
Missing = Mapping[str, Mapping[str, set[int]]]
"""Model -> capability -> indices of the items whose images are missing."""


def seed_of(seed: int, item: Item) -> int:
    """The noise seed of one item, from the bench's seed and the item's key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item.key}".encode()).digest()[:4], "big")


class GenerationLog:
    """`drawn.jsonl`: the images that are complete, a JSON line each; every process appends to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "drawn.jsonl"

    def read(self) -> Generated:
        """The images that any process has made and that still exist."""
        return {key: line["pixels_sha256"] for key, line in self._kept(self._parts()).items()}

    def merge(self) -> Generated:
        """The same, after the logs of all processes are merged into one file."""
        parts = self._parts()
        kept = self._kept(parts)
        if parts:
            with disk_errors(self.file):
                write_atomic(self.file, "".join(json.dumps(line) + "\n" for line in kept.values()).encode())
                for part in parts:
                    part.unlink()
        return {key: line["pixels_sha256"] for key, line in kept.items()}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("drawn.*.jsonl"))

    def _kept(self, parts: Sequence[Path]) -> dict[tuple[str, str], dict]:
        lines = [line for file in (self.file, *parts) for line in read_lines(file) if _is_complete(line)]
        return {(line["model"], line["key"]): line for line in lines if (self.folder / line["image"]).is_file()}

    def add(self, rank: int, model: str, key: str, image: str, pixels: str) -> None:
        """Append one image that the process `rank` has made."""
        line = {"model": model, "key": key, "image": image, "pixels_sha256": pixels}
        file = self.folder / f"drawn.{rank}.jsonl"
        with disk_errors(file), file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _is_complete(line: dict) -> bool:
    return all(isinstance(line.get(name), str) for name in ("model", "key", "image", "pixels_sha256"))


class _ItemPrompts(Prompts):
    """A suite's prompts as a data source of the encoder."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: Any) -> Any:
        return self.items[row].prompt

    def where(self, row: int) -> str:
        return f"item {self.items[row].key} ({self.items[row].category})"

    def shape(self, row: int) -> Hashable:
        """(width, height) of each of an item's source images; None without one."""
        return None


class _ItemEdits(_ItemPrompts, Edits):
    """A suite's edits (instruction and source image) as a data source of the encoder."""

    def __getitem__(self, row: Any) -> Any:
        item = self.items[row]
        assert item.source is not None
        given = (item.source, *item.references)
        read = [open_image(one, check=False, alpha=True) if self.alpha else picture(one) for one in given]
        return item.prompt, read if len(read) > 1 else read[0]

    def shape(self, row: int) -> Hashable:
        return tuple(map(_size_of, (self.items[row].source, *self.items[row].references)))


def _size_of(source: Image.Image | Path | None) -> Size | None:
    """(width, height) of a source; rows of one size share a block, so EXIF orientation does not matter here."""
    if isinstance(source, Path):
        with suppress(OSError), Image.open(source) as opened:
            return opened.size
    return picture(source).size if source is not None else None


def missing_images(lineup: Lineup, items: Mapping[str, Sequence[Item]], generated: Generated) -> Missing:
    """What each model still has to generate: nothing for folders of images and for a repetition of another model."""
    found: dict[str, dict[str, set[int]]] = {}
    for capability, wanted in items.items():
        first = lineup.first_of(capability)
        for model in lineup.models:
            rows = {n for n, item in enumerate(wanted) if (model.name, item.id) not in generated}
            if rows and model.image_folder is None and first[model.name] == model.name:
                found.setdefault(model.name, {})[capability] = rows
    return found


@dataclass(frozen=True)
class _Batch:
    """One batch of one model: indices of a capability's items."""

    model: Model
    capability: str
    rows: tuple[int, ...]


class ImageGenerator:
    """Generates the missing images of a bench.

    `items` by capability; `call` the pipeline's arguments; `batch` images at once, None for what `BATCH` and
    `BATCH_PIXELS` allow.
    """

    def __init__(
        self,
        lineup: Lineup,
        items: Mapping[str, Sequence[Item]],
        store: ImageStore,
        call: Mapping[str, Any],
        seed: int,
        batch: int | None,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.lineup, self.items, self.store = lineup, items, store
        self.call, self.seed, self.batch = call, seed, batch
        self.processes, self.progress = processes, progress
        self._log = GenerationLog(store.folder)

    def run(self, missing: Missing, prepare: Callable[[Any], None]) -> dict:
        """Generate `missing`; returns the seconds of loading and by model. Before it the main process calls
        `prepare(host)`.

        Every process of a run calls this with the same `missing`, and returns when all of them are done.
        """
        from danceopd.bench.host import ModelHost

        start = time.perf_counter()
        host = ModelHost(self.lineup, str(self.processes.device))
        needed = [c for c in self.items if any(c in found for found in missing.values())]
        encoder = host.encoder(needed, self.call, self.batch or BATCH)
        conditions = {capability: self._encoded(encoder, capability) for capability in needed}
        models = {m.name: m for m in self.lineup.models}
        nulls = {
            (name, capability): host.null_condition(models[name], encoder.pipelines[capability])
            for name, found in missing.items()
            for capability in found
            if models[name].guided(capability)
        }
        free_encoders(encoder, host.pipe)
        seconds: dict[str, Any] = {"load": round(time.perf_counter() - start, 2), "models": {}}
        if self.processes.is_main:
            prepare(host)
        batches = self._batches(missing, conditions)
        self._generate(batches, missing, host, encoder, conditions, nulls, seconds["models"])
        self.processes.all_max([0])
        return seconds

    def _encoded(self, encoder: Encoder, capability: str) -> CachedConditions:
        """The encoded items of a capability: each process encodes its share, in whole chunks, then reads all."""
        items = self.items[capability]
        data = (_ItemEdits if capability == "editing" else _ItemPrompts)(items)
        steps, count = self.call["num_inference_steps"], self.processes.world_size
        if count > 1:
            groups = _grouped(len(items), data.shape)
            chunks = [chunk for rows in groups for chunk in _chunks(rows, encoder.pipelines[capability].chunk)]
            mine = [row for chunk in chunks[self.processes.rank :: count] for row in chunk]
            if mine:
                encoder.encode(capability, data, mine, steps)
            self.processes.all_max([0])
            encoder.store.refresh()
        return encoder.encode(capability, data, range(len(items)), steps)

    def _batches(self, missing: Missing, conditions: Mapping[str, CachedConditions]) -> list[_Batch]:
        """This process's batches with a missing image, model after model."""
        batches: dict[str, list[tuple[int, ...]]] = {}
        for capability, encoded in conditions.items():
            groups = _grouped(len(encoded), partial(_kind, encoded, self.items[capability]))
            batches[capability] = [
                tuple(part) for rows in groups for part in _chunks(rows, self._batch_size(encoded.size(rows[0])))
            ]
        mine = [
            _Batch(model, capability, rows)
            for model in self.lineup.models
            for capability, wanted in missing.get(model.name, {}).items()
            for rows in batches[capability]
            if not wanted.isdisjoint(rows)
        ]
        return mine[self.processes.rank :: self.processes.world_size]

    def _batch_size(self, size: Size) -> int:
        """The batch size for images of a size (height, width)."""
        return self.batch or max(1, min(BATCH, BATCH_PIXELS // (size[0] * size[1])))

    def _generate(
        self,
        batches: Sequence[_Batch],
        missing: Missing,
        host: ModelHost,
        encoder: Encoder,
        conditions: Mapping[str, CachedConditions],
        nulls: Mapping[tuple[str, str], Any],
        seconds: dict[str, float],
    ) -> None:
        from danceopd.models.fields import GuidedField

        wanted = {id(b): [n for n in b.rows if n in missing[b.model.name][b.capability]] for b in batches}
        done, total = 0, sum(map(len, wanted.values()))
        for model in dict.fromkeys(batch.model for batch in batches):
            start = time.perf_counter()
            with host.velocity(model) as field:
                for batch in (batch for batch in batches if batch.model is model):
                    self.progress(done, total, f"generating with {model.label}, {batch.capability}")
                    null, encoded = nulls.get((model.name, batch.capability)), conditions[batch.capability]
                    guided = field if null is None else GuidedField(field, null, model.guidance or 1.0)
                    size, steps = encoded.size(batch.rows[0]), self.call["num_inference_steps"]
                    pipeline = encoder.sized(batch.capability, size, steps)
                    items = [self.items[batch.capability][n] for n in batch.rows]
                    condition = encoded.rows(list(batch.rows)).to(host.device)
                    x = pipeline.noise([seed_of(self.seed, item) for item in items]).to(host.device)
                    for state in pipeline.denoise(condition, x, guided):
                        x = state.x
                    for n, item, image in zip(batch.rows, items, pipeline.images(x), strict=True):
                        if n in wanted[id(batch)]:
                            self._save(model, item, image)
                    done += len(wanted[id(batch)])
            seconds[model.name] = round(time.perf_counter() - start, 2)
        self.progress(total, total, "generating")

    def _save(self, model: Model, item: Item, image: Image.Image) -> None:
        path = self.store.path(model.name, item)
        pixels = self.store.save(path, flattened(image))
        self.store.save_extra_files(model.name, item)
        self._log.add(self.processes.rank, model.name, item.id, path, pixels)


def _grouped(count: int, key: Callable[[int], Hashable]) -> list[list[int]]:
    """The indices 0 to `count` - 1 in groups of equal keys, in the order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for row in range(count):
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _kind(encoded: CachedConditions, items: Sequence[Item], row: int) -> Hashable:
    """What the items of a batch share. Those of `--drift` are apart, so that the others' batches stay as they are."""
    return encoded.size(row), encoded.layout(row), items[row].group == DRIFT


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
