"""Draw the pictures of a bench that are missing: every model, the same items, from the same noise.

Items of one picture size and layout are cut into batches once for all models; an item's noise is its seed's alone,
and its companions are always the same, so neither resuming nor the number of processes changes a bit of a picture.
Batches are dealt out to the processes. Each writes its pictures and a line a picture into a journal of its own; the
first process puts the journals together, also those that a killed run has left.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.models import Lineup, Model
from danceopd.bench.pictures import Pictures
from danceopd.bench.suites import Item, picture
from danceopd.data import Edits, Prompts
from danceopd.disk import disk_faults, replace_file
from danceopd.processes import Processes
from danceopd.work import Encoder, Size, StoredQuestions, release_encoders

BATCH, BATCH_PIXELS = 64, 64 * 256 * 256
"""Pictures that are drawn at once: at most so many, and at most so many pixels."""
Progress = Callable[[int, int, str], None]
Drawn = dict[tuple[str, str], str]
"""(model, item key) -> hash of the pixels."""
Missing = Mapping[str, Mapping[str, set[int]]]
"""model -> capability -> rows of its items."""


def seed_of(seed: int, item: Item) -> int:
    """The noise seed of one item: it depends on the bench's seed and the item's key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item.key}".encode()).digest()[:4], "big")


class Journal:
    """`drawn.jsonl`: which pictures are whole, a JSON line each; every process appends to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "drawn.jsonl"

    def read(self) -> Drawn:
        """What was drawn, by any process, and is still there."""
        return {key: line["pixels_sha256"] for key, line in self._kept(self._parts()).items()}

    def merge(self) -> Drawn:
        """The same; the journals of all processes become one."""
        parts = self._parts()
        kept = self._kept(parts)
        if parts:
            with disk_faults(self.file):
                replace_file(self.file, "".join(json.dumps(line) + "\n" for line in kept.values()).encode())
                for part in parts:
                    part.unlink()
        return {key: line["pixels_sha256"] for key, line in kept.items()}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("drawn.*.jsonl"))

    def _kept(self, parts: Sequence[Path]) -> dict[tuple[str, str], dict]:
        lines = [line for file in (self.file, *parts) for line in _lines(file)]
        return {(line["model"], line["key"]): line for line in lines if (self.folder / line["image"]).is_file()}

    def add(self, rank: int, model: str, key: str, image: str, pixels: str) -> None:
        """One picture, from the process `rank`."""
        line = {"model": model, "key": key, "image": image, "pixels_sha256": pixels}
        file = self.folder / f"drawn.{rank}.jsonl"
        with disk_faults(file), file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _lines(file: Path) -> Iterator[dict]:
    """The whole lines of a journal; one that was cut off is passed over."""
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"model", "key", "image", "pixels_sha256"} <= line.keys():
                yield line


class _Words(Prompts):
    """A suite's prompts, as the encoder reads a data source."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: Any) -> Any:
        return self.items[row].prompt

    def where(self, row: int) -> str:
        return f"item {self.items[row].key} ({self.items[row].category})"

    def shape(self, row: int) -> Size | None:
        """(width, height) of a row's source; None without one."""
        return None


class _Pairs(_Words, Edits):
    """A suite's instructions with their sources."""

    def __getitem__(self, row: Any) -> Any:
        item = self.items[row]
        assert item.source is not None
        return item.prompt, picture(item.source)

    def shape(self, row: int) -> Size | None:
        source = self.items[row].source
        if isinstance(source, Path):
            with suppress(OSError), Image.open(source) as opened:
                return opened.size  # rows that share a block; what turns it is no matter here
        return picture(source).size if source is not None else None


def missing_pictures(lineup: Lineup, items: Mapping[str, Sequence[Item]], drawn: Drawn) -> Missing:
    """What each model has to draw; models that answer alike are drawn once, made elsewhere is not drawn."""
    found: dict[str, dict[str, set[int]]] = {}
    for capability, asked in items.items():
        by = lineup.drawn_by(capability)
        for model in lineup.models:
            rows = {n for n, item in enumerate(asked) if (model.name, item.key) not in drawn}
            if rows and model.pictures is None and by[model.name] == model.name:
                found.setdefault(model.name, {})[capability] = rows
    return found


@dataclass(frozen=True)
class _Job:
    """One batch of one model: rows of a capability's items."""

    model: Model
    capability: str
    rows: tuple[int, ...]


class Drawing:
    """What is missing of a bench, and the drawing of it.

    `items` by capability; `batch` rows at once, None for what fits `BATCH` and `BATCH_PIXELS`.
    """

    def __init__(
        self,
        lineup: Lineup,
        items: Mapping[str, Sequence[Item]],
        pictures: Pictures,
        call: Mapping[str, Any],
        seed: int,
        batch: int | None,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.lineup, self.items, self.pictures = lineup, items, pictures
        self.call, self.seed, self.batch = call, seed, batch
        self.processes, self.progress = processes, progress
        self._journal = Journal(pictures.folder)

    def run(self, missing: Missing, prepare: Callable[[Any], None]) -> dict:
        """Draw `missing`; seconds of loading and by model. `prepare(stage)` runs in the first process before it.

        Every process of a run calls this with the same `missing`, and returns when all of them are done.
        """
        from danceopd.bench.stage import Stage

        start = time.perf_counter()
        stage = Stage(self.lineup, str(self.processes.device))
        needed = [c for c in self.items if any(c in found for found in missing.values())]
        encoder = stage.encoder(needed, self.call, self.batch or BATCH)
        work = {capability: self._encoded(encoder, capability) for capability in needed}
        models = {m.name: m for m in self.lineup.models}
        nulls = {
            (name, capability): stage.null(models[name], encoder.draw[capability])
            for name, found in missing.items()
            for capability in found
            if models[name].guided(capability)
        }
        release_encoders(encoder, stage.pipe)
        seconds: dict[str, Any] = {"load": round(time.perf_counter() - start, 2), "models": {}}
        if self.processes.main:
            prepare(stage)
        self._draw(self._jobs(missing, work), missing, stage, encoder, work, nulls, seconds["models"])
        self.processes.highest([0])
        return seconds

    def _encoded(self, encoder: Encoder, capability: str) -> StoredQuestions:
        """All items of a capability in the store: each process encodes its share, whole chunks, then reads all."""
        items = self.items[capability]
        data = (_Pairs if capability == "editing" else _Words)(items)
        steps, count = self.call["steps"], self.processes.count
        if count > 1:
            alike: dict[Hashable, list[int]] = {}
            for row in range(len(items)):
                alike.setdefault(data.shape(row), []).append(row)
            chunks = [c for rows in alike.values() for c in _cut(rows, encoder.draw[capability].chunk)]
            mine = [row for chunk in chunks[self.processes.rank :: count] for row in chunk]
            if mine:
                encoder.questions(capability, data, mine, steps)
            self.processes.highest([0])
            encoder.store.refresh()
        return encoder.questions(capability, data, range(len(items)), steps)

    def _jobs(self, missing: Missing, work: Mapping[str, StoredQuestions]) -> list[_Job]:
        """This process's batches with a missing picture, model after model."""
        batches: dict[str, list[tuple[int, ...]]] = {}
        for capability, questions in work.items():
            alike: dict[Hashable, list[int]] = {}
            for row in range(len(questions)):
                alike.setdefault((questions.size(row), questions.layout(row)), []).append(row)
            batches[capability] = [
                tuple(part) for rows in alike.values() for part in _cut(rows, self._rows(questions.size(rows[0])))
            ]
        jobs = [
            _Job(model, capability, rows)
            for model in self.lineup.models
            for capability, lost in missing.get(model.name, {}).items()
            for rows in batches[capability]
            if not lost.isdisjoint(rows)
        ]
        return jobs[self.processes.rank :: self.processes.count]

    def _rows(self, size: Size) -> int:
        """Pictures of a size (height, width) that are drawn at once."""
        return self.batch or max(1, min(BATCH, BATCH_PIXELS // (size[0] * size[1])))

    def _draw(
        self,
        jobs: Sequence[_Job],
        missing: Missing,
        stage: Any,
        encoder: Encoder,
        work: Mapping[str, StoredQuestions],
        nulls: Mapping[tuple[str, str], Any],
        seconds: dict[str, float],
    ) -> None:
        from danceopd.fields import GuidedField

        lost = {id(job): [n for n in job.rows if n in missing[job.model.name][job.capability]] for job in jobs}
        done, total = 0, sum(map(len, lost.values()))
        for model in dict.fromkeys(job.model for job in jobs):
            start = time.perf_counter()
            with stage.acting(model) as field:
                for job in (job for job in jobs if job.model is model):
                    self.progress(done, total, f"drawing {model.label}, {job.capability}")
                    null, questions = nulls.get((model.name, job.capability)), work[job.capability]
                    asked = field if null is None else GuidedField(field, null, model.guidance or 1.0)
                    size = questions.size(job.rows[0])
                    drawer = encoder.sized(job.capability, size, self.call["steps"])
                    items = [self.items[job.capability][n] for n in job.rows]
                    condition = questions.rows(list(job.rows)).to(stage.device)
                    x = drawer.noise([seed_of(self.seed, item) for item in items]).to(stage.device)
                    for state in drawer.denoise(condition, x, asked):
                        x = state.x
                    for n, item, image in zip(job.rows, items, drawer.images(x), strict=True):
                        if n in lost[id(job)]:
                            self._keep(model, item, image)
                    done += len(lost[id(job)])
            seconds[model.name] = round(time.perf_counter() - start, 2)
        self.progress(total, total, "drawing")

    def _keep(self, model: Model, item: Item, image: Image.Image) -> None:
        path = self.pictures.path(model.name, item)
        pixels = self.pictures.save(path, image)
        self.pictures.keep_records(model.name, item)
        self._journal.add(self.processes.rank, model.name, item.key, path, pixels)


def _cut(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
