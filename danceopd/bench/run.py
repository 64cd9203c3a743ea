"""Run a bench: every model draws the same prompts and edits from the same noise, and a suite scores them.

Prompts and source images are encoded once for all models, LoRAs are merged into one backbone in turn, and each
picture is written and scored as its batch completes: `samples.jsonl` grows a line an item and model, so an
interrupted bench continues where it stopped. An item's noise depends on the seed and the item alone, never on
the batch or the limit. `scores.json` names everything that could have made the numbers different.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.models import Lineup, Model, line_up
from danceopd.bench.report import report as write_report
from danceopd.bench.scores import machine, summarise
from danceopd.bench.suites import Item, Suite
from danceopd.disk import disk_faults, lock, replace_file
from danceopd.errors import UserError
from danceopd.pipelines.families import family_of
from danceopd.recipe import Recipe
from danceopd.sentences import nearest
from danceopd.work import call_of

SUITES = {"scenes": "danceopd.bench.suites.scenes"}
CEILING = 96
"""Items a capability that the ceiling is measured on."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchResult:
    """A finished bench: its folder, what `scores.json` and `samples.jsonl` hold, and the report's path."""

    folder: Path
    scores: dict
    rows: list[dict]
    report: Path

    def overall(self, model: str, capability: str) -> float:
        """A model's overall score: share correct in generation, O in editing."""
        found = next(m for m in self.scores["models"] if m["name"] == model)
        return found[capability]["overall"]["mean"]


def suite_named(name: str) -> Any:
    """The suite of that name; UserError names the nearest when there is none."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}{nearest(name, SUITES)}")
    return import_module(SUITES[name]).Suite()


def seed_of(seed: int, item: Item) -> int:
    """The noise seed of one item: it depends on the bench's seed and the item's key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item.key}".encode()).digest()[:4], "big")


def bench(
    student: str | Path,
    suite: str = "scenes",
    against: Sequence[str] | None = None,
    output: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    probes: bool = False,
    batch: int = 64,
    progress: Progress | None = None,
    blend_weights: Sequence[float] | Mapping[str, float] = (),
    recipe: Recipe | None = None,
    blend_methods: Sequence[str] = ("linear",),
) -> BenchResult:
    """Score a student beside what it came from, and write `scores.json`, `samples.jsonl`, `images/`, `report.html`.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name. `against`:
    see `line_up`; nothing given means base, teachers and blend, and "none" nobody. `limit`: items a capability.
    `output`: by default `bench` inside the student's folder. `probes` adds held-out and compound items.
    `blend_weights`: shares of the first teacher to try, or one weight a teacher by name; `blend_methods`: ways to
    blend (`blend.METHODS`). The best blend stands in the table, the others in the report. The same command again
    continues an interrupted bench. Raises UserError for anything a user can mend.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit} items; give 1 or more, or leave it out for the whole suite")
    if batch < 1:
        raise UserError(f"the batch is {batch}; give 1 or more")
    if seed < 0:
        raise UserError(f"the seed is {seed}; give a whole number from 0")
    started = time.perf_counter()
    chosen = suite_named(suite)
    lineup = line_up(student, _words(against), blend_weights, recipe, blend_methods)
    folder = _output(student, lineup, output)
    work = _Work(chosen, lineup, folder, limit, seed, probes, _device(device), batch, progress or (lambda *_: None))
    rows, seconds = work.run()
    settings = work.settings() | {"seconds": seconds | {"total": round(time.perf_counter() - started, 2)}}
    scores = summarise(rows, lineup, settings)
    _write_json(folder / "scores.json", scores)
    return BenchResult(folder, scores, rows, write_report(folder))


def _words(against: Sequence[str] | None) -> list[str] | None:
    words = [word for word in against or () if word]
    return [] if words == ["none"] else words or None


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; use device cpu")
    return device


def _output(student: str | Path, lineup: Lineup, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    path = Path(student)
    return path / "bench" if path.is_dir() else Path("bench") / path.stem


def _write_json(path: Path, value: Any) -> None:
    with disk_faults(path):
        replace_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


class _Work:
    """One bench on its way: the items, the loaded models, and the rows written so far."""

    def __init__(
        self,
        suite: Any,
        lineup: Lineup,
        folder: Path,
        limit: int | None,
        seed: int,
        probes: bool,
        device: str,
        batch: int,
        progress: Progress,
    ) -> None:
        self.suite, self.lineup, self.folder, self.seed = suite, lineup, folder, seed
        self.device, self.batch, self.progress = device, batch, progress
        self.limit, self.probes = limit, probes
        self.call = call_of(lineup.folder, lineup.call, family_of(lineup.folder, lineup.family))
        self.items = suite_items(suite, limit, probes)
        self.identity = {
            "suite": suite.name,
            "version": suite.version,
            "protocol": suite.protocol,
            "seed": seed,
            "limit": limit,
            "probes": probes,
            "call": self.call,
            "models": {m.name: m.sha256 for m in lineup.models},
        }

    def run(self) -> tuple[list[dict], dict]:
        """All rows, in the order of models and items, and the seconds it took."""
        mark = self.folder / "bench.json"
        if self.folder.is_dir() and not mark.is_file() and any(p.name != ".lock" for p in self.folder.iterdir()):
            raise UserError(f"output folder {self.folder} holds files that are not a bench; choose another --output")
        with disk_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(self.folder / ".lock")
        try:
            rows = self._continued()
            todo = [m for m in self.lineup.models if any((m.name, i.key) not in rows for i in self.all())]
            seconds = self._sample(todo, rows) if todo else {"models": {}}
        finally:
            if held is not None:
                held.close()
        order = [(m.name, i.key) for m in self.lineup.models for i in self.all()]
        return [rows[key] for key in order], seconds

    def settings(self) -> dict:
        """What a result says about how it was made."""
        suite = {"name": self.suite.name, "version": self.suite.version, "protocol": self.suite.protocol}
        return {
            "suite": suite,
            "seed": self.seed,
            "limit": self.limit,
            "call": self.call,
            "ceiling": self.ceiling,
            "machine": machine(self.device),
        }

    def all(self) -> list[Item]:
        """Every item, of both capabilities."""
        return [item for items in self.items.values() for item in items]

    def _continued(self) -> dict[tuple[str, str], dict]:
        """Rows of an interrupted bench with the same identity; UserError where the folder holds another."""
        mark, lines = self.folder / "bench.json", self.folder / "samples.jsonl"
        if not mark.is_file():
            _write_json(mark, self.identity)
            return {}
        with suppress(ValueError):
            known = json.loads(mark.read_text(encoding="utf-8"))
            other = [key for key, value in json.loads(json.dumps(self.identity)).items() if known.get(key) != value]
            if not other:
                rows = list(_whole_lines(lines, self.folder))
                with disk_faults(lines):
                    replace_file(lines, "".join(map(_line, rows)).encode())
                return {(row["model"], row["key"]): row for row in rows}
            raise UserError(
                f"output folder {self.folder} holds another bench ({', '.join(other)} differ); choose "
                "another --output, or delete that folder"
            )
        raise UserError(
            f"output folder {self.folder} holds a bench whose bench.json is damaged; choose another "
            "--output, or delete that folder"
        )

    def _sample(self, models: Sequence[Model], rows: dict) -> dict:
        """Draw, decode, score and write what is missing; seconds by model."""
        start = time.perf_counter()
        from danceopd.bench.stage import Stage

        stage = Stage(self.lineup, self.device)
        encoded = {c: self._encode(stage, c, items) for c, items in self.items.items() if items}
        seconds: dict[str, Any] = {"load": round(time.perf_counter() - start, 2), "models": {}}
        self._measure_ceiling(stage)
        total = len(self.lineup.models) * len(self.all())
        twin = {_asked(m): m.name for m in reversed(self.lineup.models)}
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as out:
            for model in models:
                start = time.perf_counter()
                first = twin[_asked(model)]
                for capability, (pipeline, condition, noise) in encoded.items():
                    null = stage.null(model, pipeline)
                    items = self.items[capability]
                    missing = [n for n, i in enumerate(items) if (model.name, i.key) not in rows]
                    for at in range(0, len(missing), self.batch):
                        index = missing[at : at + self.batch]
                        part = [items[n] for n in index]
                        self.progress(len(rows), total, f"{model.label}, {capability}")
                        if first != model.name:
                            fresh = [rows[first, i.key] | {"model": model.name} for i in part]
                        else:
                            with stage.acting(model, null) as field:
                                x = noise[index].to(self.device)
                                for state in pipeline.denoise(condition.rows(index).to(self.device), x, field):
                                    x = state.x
                                images = pipeline.images(x)
                            fresh = self._scored(model, capability, part, images)
                        rows.update({(row["model"], row["key"]): row for row in fresh})
                        with disk_faults(self.folder):
                            out.write("".join(map(_line, fresh)))
                            out.flush()
                seconds["models"][model.name] = round(time.perf_counter() - start, 2)
        self.progress(total, total, "report")
        return seconds

    def _encode(self, stage: Any, capability: str, items: Sequence[Any]) -> tuple[Any, Any, Any]:
        """(pipeline, condition, noise) of all items, recorded once for all models; sources and targets written."""
        prompts, seeds = [i.prompt for i in items], [seed_of(self.seed, i) for i in items]
        pipeline = stage.drawer(capability, self.call, self.batch)
        if capability == "generation":
            return pipeline, pipeline.conditions(prompts), pipeline.noise(seeds)
        for item in items:
            self._save("source", item, item.source, "_SRCIMG")
            if item.target is not None:
                self._save("target", item, item.target)
        return pipeline, pipeline.conditions(prompts, [i.source for i in items]), pipeline.noise(seeds)

    def _measure_ceiling(self, stage: Any) -> None:
        """What right pictures score after the autoencoder's round trip, kept beside the samples."""
        file = self.folder / "ceiling.json"
        if hasattr(self.suite, "ceiling") and not file.is_file():
            self.progress(0, 1, "ceiling")
            _write_json(file, self.suite.ceiling(stage.round_trip, min(self.limit or CEILING, CEILING)))

    @property
    def ceiling(self) -> dict | None:
        """What the suite reads from right pictures behind this autoencoder, where it can tell."""
        file = self.folder / "ceiling.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _path(self, model: str, item: Any, mark: str = "") -> str:
        return f"images/{model}/{item.category}/{item.key}{mark}.png"

    def _save(self, model: str, item: Any, image: Image.Image, mark: str = "") -> str:
        path = self.folder / self._path(model, item, mark)
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=4)
        return hashlib.sha256(image.tobytes()).hexdigest()

    def _scored(
        self, model: Model, capability: str, items: Sequence[Item], images: Sequence[Image.Image]
    ) -> list[dict]:
        rows = []
        for item, image, score in zip(items, images, self.suite.score(items, images), strict=True):
            row = {
                "model": model.name,
                "capability": capability,
                "category": item.category,
                "key": item.key,
                "group": item.group,
                "prompt": item.prompt,
                "seed": seed_of(self.seed, item),
                "probe": item.probe,
                "image": self._path(model.name, item),
                "pixels_sha256": self._save(model.name, item, image),
            }
            if capability == "editing":
                row["source"] = self._path("source", item, "_SRCIMG")
                row["target"] = self._path("target", item) if item.target is not None else None
            rows.append(row | score_row(score))
        return rows


def suite_items(suite: Suite, limit: int | None, probes: bool) -> dict[str, list[Item]]:
    """capability -> items of a suite; probes follow the ordinary items and count in no overall score."""
    found = {"generation": list(suite.generation_items(limit)), "editing": list(suite.editing_items(limit))}
    for capability, items in suite.probe_items(limit).items() if probes else ():
        found[capability] += items
    return found


def score_row(score: Any) -> dict:
    """The part of a row that the suite says: score, correct, reason, and the other plain fields of its score."""
    parts = {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in vars(score).items()
        if isinstance(value, int | float | str) and key not in ("value", "correct", "reason")
    }
    return {
        "score": round(float(score.value), 6),
        "correct": bool(score.correct),
        "reason": score.reason,
        "parts": parts,
    }


def _asked(model: Model) -> tuple:
    """Equal for models that answer alike."""
    return model.sha256, model.whole, model.guidance, model.negative


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: Path, folder: Path) -> list[dict]:
    """Rows of an interrupted `samples.jsonl` whose picture is there; the line that was cut off is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if (folder / row["image"]).is_file():
                rows.append(row)
    return rows
