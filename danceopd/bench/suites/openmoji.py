"""The ``openmoji`` suite: real drawings, exact edits, no judge.

384 prompts and 384 edits of the test split, 64 a category: GenEval's six in its record format, and GEdit's six that
have an exact answer here. Pictures are 512 x 512 and of any size when they come back. Generation is the share of
correct pictures (0 to 1), editing the mean O (0 to 10), both as the mean of six categories. The drawings are a data
step (`danceopd openmoji fetch`); sources, targets and masks are rendered into the cache when first asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from danceopd.bench.suites import Item
from danceopd.cache import cache_folder
from danceopd.disk import disk_faults, replace_file, sha256
from danceopd.errors import UserError
from danceopd.openmoji import fetch, score
from danceopd.openmoji.drawings import Drawings
from danceopd.openmoji.kinds import KINDS, Kind
from danceopd.openmoji.read import ALIKE_ENOUGH, SCALES, SHIFT, Reader, Reading
from danceopd.openmoji.render import SIDE, render
from danceopd.openmoji.tasks import edits, prompts
from danceopd.scenes.edits import TASKS, Edit
from danceopd.scenes.grammar import Scene
from danceopd.scenes.prompts import TAGS, Prompt

EACH = 64
"""Items a category."""


@dataclass(frozen=True)
class DrawingScore:
    """What one picture got: as `SceneScore`, with ``likeness``, the least cosine of an outline with its class."""

    value: float
    correct: bool
    reason: str
    seen: str
    psnr: float
    unexplained: float
    likeness: float | None = None
    sc: float | None = None
    pq: float | None = None
    success: float | None = None
    over_editing: float | None = None
    naturalness: float | None = None
    artifacts: float | None = None
    target_psnr: float | None = None
    item: Item | None = field(default=None, repr=False, compare=False)
    reading: Reading | None = field(default=None, repr=False, compare=False)


def describe(scene: Scene) -> str:
    """A scene in words: ``red car, blue dog on white, plain``."""
    things = ", ".join(t.shape if t.shape == "something" else f"{t.colour} {t.shape}" for t in scene.things)
    return f"{things or 'nothing'} on {scene.background}, {scene.style}"


class Suite:
    """The suite. ``data``: the fetched folder when it is not in the cache. Results are quoted for seed 0."""

    name = "openmoji"
    version = "1"
    scale = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
    share = {"generation": True, "editing": False}
    subsets: dict[str, tuple[str, ...]] = {}
    needs = f"run `{fetch.COMMAND}` once"

    @classmethod
    def here(cls, data: str | Path | None = None) -> Path | None:
        """Where the drawings are on this machine, or None."""
        place = fetch.default_folder() if data is None else Path(data).expanduser()
        return place if fetch.fetched(place) else None

    def __init__(
        self,
        data: Path | None = None,
        split: str = "test",
        seed: int = 0,
        kinds: Sequence[Kind] = KINDS,
        each: int = EACH,
    ):
        self.folder = fetch.require(data)
        self.split, self.seed, self.kinds, self.each = split, seed, tuple(kinds), each
        self.drawings = Drawings(self.folder, self.kinds)
        self.reader = Reader(self.drawings)

    @cached_property
    def rules(self) -> dict[str, Any]:
        """What a result says about how it was scored, and whose drawings these are."""
        return {
            "scorer": "read by matching the known drawings, then compared fact by fact; no judge",
            "resize": "any picture is squeezed to 256 x 256 (box) and read there",
            "generation": "share of correct pictures, by GenEval's checker",
            "editing": "O = sqrt(min(success, over-editing) * min(naturalness, artifacts)) of each item, 0 to 10",
            "overall": "unweighted mean of the category means",
            "tolerance": {
                "shift": f"{SHIFT / 64:.0%} of the picture",
                "scale": [min(SCALES), max(SCALES)],
                "outline cosine": ALIKE_ENOUGH,
            },
            "data": f"npm package {fetch.PACKAGE} {fetch.VERSION}, sha256 of the drawings {self._drawn_from}",
            "attribution": fetch.ATTRIBUTION,
        }

    @cached_property
    def _drawn_from(self) -> str:
        files = [self.folder / "color" / "svg" / f"{kind.file}.svg" for kind in self.kinds]
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return prompts(self.split, len(TAGS) * self.each, self.seed, self._names)

    @cached_property
    def _edits(self) -> list[Edit]:
        return edits(self.split, len(TASKS) * self.each, self.seed, self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(kind.name for kind in self.kinds)

    @cached_property
    def protocol(self) -> str:
        """sha256 over the version, the drawings and everything that the suite asks and expects."""
        facts: list[Any] = [self.name, self.version, self.split, self.seed, self._drawn_from]
        facts += [[p.record(), p.scene.key()] for p in self._prompts]
        facts += [[e.task_type, e.instruction, e.goal, e.source.key(), e.target.key()] for e in self._edits]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def generation_items(self, limit: int | None = None) -> list[Item]:
        """The first ``limit`` of the prompts, the six categories in turn."""
        return [
            Item(
                key=self._key("prompt", prompt.prompt, prompt.scene),
                capability="generation",
                group="generation",
                category=prompt.tag,
                prompt=prompt.prompt,
                probe=None,
                source=None,
                target=None,
                task=prompt,
            )
            for prompt in self._prompts[:limit]
        ]

    def editing_items(self, limit: int | None = None) -> list[Item]:
        """The first ``limit`` of the edits, the six categories in turn; pictures are rendered into the cache."""
        return [self._editing(edit) for edit in self._edits[:limit]]

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """None: a model with real weights was trained on anything."""
        return {"generation": [], "editing": []}

    def place(self, item: Item) -> str:
        """A folder for each category."""
        return f"{item.category}/{item.key}.png"

    def source_place(self, item: Item) -> str | None:
        """No copies of sources beside the pictures."""
        return None

    def score(self, items: Sequence[Item], images: Sequence[Any]) -> list[DrawingScore]:
        """One score an item; images are PIL or uint8 (h, w, 3) of any size, in the order of the items."""
        if len(items) != len(images):
            raise UserError(f"{len(items)} items of suite openmoji got {len(images)} images: give one image an item")
        return [self._scored(item, image) for item, image in zip(items, images)]

    def ceiling(self, roundtrip: Callable[[list[Image.Image]], list[Any]], limit: int | None = 96) -> dict[str, Any]:
        """What right pictures get after an autoencoder's round trip (images -> images, as many).

        ``{"read", "n", "generation", "editing"}``: the share of pictures with every fact right out of ``n``, and for
        each capability ``{"overall", "categories"}`` of the first ``limit`` items as means.
        """
        out: dict[str, Any] = {}
        right: list[bool] = []
        for capability, items in (
            ("generation", self.generation_items(limit)),
            ("editing", self.editing_items(limit)),
        ):
            scenes = [i.task.scene if capability == "generation" else i.task.target for i in items]
            scores = self.score(items, roundtrip([render(scene, self.drawings) for scene in scenes]))
            right += [s.correct for s in scores]
            by: dict[str, list[float]] = {}
            for item, found in zip(items, scores):
                by.setdefault(item.category, []).append(found.value)
            means = {category: float(np.mean(values)) for category, values in by.items()}
            out[capability] = {"overall": float(np.mean(list(means.values()))), "categories": means}
        return {"read": float(np.mean(right)), "n": len(right), **out}

    def _key(self, *facts: str | Scene) -> str:
        words = [fact.key() if isinstance(fact, Scene) else fact for fact in (self.name, *facts)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]

    def _editing(self, edit: Edit) -> Item:
        key = self._key(edit.task_type, edit.instruction, edit.source, edit.target)
        return Item(
            key=key,
            capability="editing",
            group=edit.group,
            category=edit.task_type,
            prompt=edit.instruction,
            probe=None,
            source=self._kept(f"{key}-source.png", lambda: render(edit.source, self.drawings)),
            target=self._kept(f"{key}-target.png", lambda: render(edit.target, self.drawings)),
            mask=self._kept(f"{key}-mask.png", lambda: Image.fromarray(score.editable(edit, self.drawings, SIDE))),
            task=edit,
        )

    def _kept(self, name: str, make: Callable[[], Image.Image]) -> Path:
        """A picture in the cache, made once; where it lies depends on the drawings and the version."""
        folder = cache_folder() / "openmoji" / "pictures" / f"{self.version}-{self._drawn_from[:12]}"
        path = folder / name
        if not path.is_file():
            content = io.BytesIO()
            make().save(content, "PNG", compress_level=4)
            with disk_faults(path):
                folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, content.getvalue())
        return path

    def _scored(self, item: Item, image: Any) -> DrawingScore:
        task = item.task
        if isinstance(task, Prompt):
            reading = self.reader.read(image)
            verdict = score.score_prompt(task, reading)
            return DrawingScore(float(verdict.correct), verdict.correct, verdict.reason, **_facts(item, reading))
        reading = score.read_edit(self.reader, task, image)
        found = score.score_edit(task, reading, self.drawings)
        parts = ("sc", "pq", "success", "over_editing", "naturalness", "artifacts", "target_psnr")
        return DrawingScore(
            found.o,
            found.exact,
            "; ".join(found.reasons),
            **_facts(item, reading),
            **{part: getattr(found, part) for part in parts},
        )


def _facts(item: Item, reading: Reading) -> dict[str, Any]:
    return {
        "seen": describe(reading.scene),
        "psnr": reading.psnr,
        "unexplained": reading.unexplained,
        "likeness": min(reading.likeness, default=None),
        "item": item,
        "reading": reading,
    }
