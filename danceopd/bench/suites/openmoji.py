"""The ``openmoji`` suite: scenes of OpenMoji drawings, exact edits, scored without a judge.

384 prompts and 384 edits of the test split, 64 a category: GenEval's six categories in its record format, and the six
of GEdit's that have an exact answer here. Source images are 512 x 512; outputs may be of any size. Generation is the
share of correct images (0 to 1), editing the mean O (0 to 10), each the mean of six category means. The drawings are
downloaded once (`danceopd openmoji fetch`); sources, targets and masks are rendered into the cache when first needed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.suites.protocol import Item
from danceopd.bench.suites.scenes import WorldScore, WorldSuite, world_score
from danceopd.common.cache import cache_folder
from danceopd.common.files import disk_errors, sha256, write_atomic
from danceopd.worlds.openmoji import fetch, score
from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.kinds import KINDS, Kind
from danceopd.worlds.openmoji.read import ALIKE_ENOUGH, SCALES, SHIFT, Reader
from danceopd.worlds.openmoji.render import SIDE, render
from danceopd.worlds.openmoji.tasks import edits, prompts
from danceopd.worlds.scenes.edits import TASKS, Edit
from danceopd.worlds.scenes.grammar import Scene
from danceopd.worlds.scenes.prompts import TAGS, Prompt

EACH = 64
"""Items a category."""


class Suite(WorldSuite):
    """The suite. ``data``: the downloaded folder when it is not in the cache. Results are quoted for seed 0."""

    name = "openmoji"
    version = "1"
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
        """How the result was scored, and whose drawings these are."""
        return {
            "scorer": "read by matching the known drawings, then compared fact by fact; no judge",
            "resize": "any image is resized to 256 x 256 (box) and read there",
            "generation": "share of correct images, by GenEval's checker",
            "editing": "O = sqrt(min(success, over-editing) * min(naturalness, artifacts)) of each item, 0 to 10",
            "overall": "unweighted mean of the category means",
            "tolerance": {
                "shift": f"{SHIFT / 64:.0%} of the image",
                "scale": [min(SCALES), max(SCALES)],
                "outline cosine": ALIKE_ENOUGH,
            },
            "data": f"npm package {fetch.PACKAGE} {fetch.VERSION}, sha256 of the drawings {self._drawings_sha256}",
            "attribution": fetch.ATTRIBUTION,
        }

    @cached_property
    def _drawings_sha256(self) -> str:
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
        """sha256 over the version, the drawings and everything that is asked and expected."""
        facts: list[Any] = [self.name, self.version, self.split, self.seed, self._drawings_sha256]
        facts += [[p.record(), p.scene.key()] for p in self._prompts]
        facts += [[e.task_type, e.instruction, e.goal, e.source.key(), e.target.key()] for e in self._edits]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return [
            Item(
                key=self._key("prompt", prompt.prompt, prompt.scene),
                capability="generation",
                group="generation",
                category=prompt.tag,
                prompt=prompt.prompt,
                task=prompt,
            )
            for prompt in self._prompts[:limit]
        ]

    def editing_items(self, limit: int | None = None) -> list[Item]:
        """The first ``limit`` edits, the categories in turn; their images are rendered into the cache."""
        return [self._editing(edit) for edit in self._edits[:limit]]

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
            source=self._cached(f"{key}-source.png", lambda: render(edit.source, self.drawings)),
            target=self._cached(f"{key}-target.png", lambda: render(edit.target, self.drawings)),
            mask=self._cached(f"{key}-mask.png", lambda: Image.fromarray(score.editable(edit, self.drawings, SIDE))),
            task=edit,
        )

    def _cached(self, name: str, make: Callable[[], Image.Image]) -> Path:
        """An image in the cache, rendered once; its folder depends on the drawings and the version."""
        folder = cache_folder() / "openmoji" / "pictures" / f"{self.version}-{self._drawings_sha256[:12]}"
        path = folder / name
        if not path.is_file():
            content = io.BytesIO()
            make().save(content, "PNG", compress_level=4)
            with disk_errors(path):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content.getvalue())
        return path

    def _scores(self, items: Sequence[Item], images: Sequence[Any]) -> list[WorldScore]:
        return [self._score(item, image) for item, image in zip(items, images)]

    def _score(self, item: Item, image: Any) -> WorldScore:
        if isinstance(item.task, Prompt):
            reading = self.reader.read(image)
            found: Any = score.score_prompt(item.task, reading)
        else:
            reading = score.read_edit(self.reader, item.task, image)
            found = score.score_edit(item.task, reading, self.drawings)
        return world_score(item, reading, found, likeness=min(reading.likeness, default=None))

    def _rendered(self, scene: Scene) -> Image.Image:
        return render(scene, self.drawings)

    def _is_read(self, score: WorldScore, scene: Scene) -> bool:
        return score.correct
