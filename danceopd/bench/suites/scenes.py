"""The ``scenes`` suite: GenEval's and GEdit's six categories each, in the exact world, scored as facts.

512 prompts and 512 edits of the test split, the categories in turn; apart from them the probes: held-out bindings
and operations, compound edits, five objects. Generation is the share of correct images (mean of six categories,
0 to 1), editing the mean O of six categories (0 to 10). Every score is read beside the ceiling: what perfect
pictures get after the autoencoder's round trip, which no model behind that autoencoder can be asked to pass.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from danceopd.bench import compare
from danceopd.bench.suites import Item
from danceopd.bench.suites.diversity import diversity
from danceopd.errors import UserError
from danceopd.scenes.edits import GLOBAL, LOCAL, PROBE_TASKS, TASKS, Edit, edits
from danceopd.scenes.grammar import Scene
from danceopd.scenes.prompts import PROBE_TAGS, TAGS, Prompt, prompts
from danceopd.scenes.read import Reading, read_many
from danceopd.scenes.render import render
from danceopd.scenes.score import score_edit, score_prompt

SIZE, PROBE_SIZE = 512, 64
PROBES = {
    "held-out binding": "generation",
    "five objects": "generation",
    "held-out edit binding": "editing",
    "held-out operation": "editing",
    "compound": "editing",
}
"""Sets that are reported apart, and the capability that each asks for."""
DRAWN: dict[str, Callable[..., Sequence[Prompt | Edit]]] = {
    "prompts": prompts,
    "edits": edits,
    "held-out binding": partial(prompts, heldout=True),
    "five objects": partial(prompts, tags=PROBE_TAGS),
    "held-out edit binding": partial(edits, heldout="binding"),
    "held-out operation": partial(edits, heldout="operation"),
    "compound": partial(edits, tasks=PROBE_TASKS),
}
"""How the tasks of each set are drawn."""


@dataclass(frozen=True)
class SceneScore:
    """What one image got.

    ``value`` is 0 or 1 for generation, O from 0 to 10 for editing; ``correct`` asks every fact of an edit, and
    ``success`` to ``artifacts`` are its parts (None for generation). ``reason`` says what was lost, ``seen`` what
    the image shows; ``psnr`` (dB) and ``unexplained`` (share of pixels) how sure that is.
    """

    value: float
    correct: bool
    reason: str
    seen: str
    psnr: float
    unexplained: float
    sc: float | None = None
    pq: float | None = None
    success: float | None = None
    over_editing: float | None = None
    naturalness: float | None = None
    artifacts: float | None = None
    target_psnr: float | None = None
    item: Item | None = field(default=None, repr=False, compare=False)
    reading: Reading | None = field(default=None, repr=False, compare=False)


def picture(scene: Scene) -> Image.Image:
    """A scene as a 64x64 RGB PIL image."""
    return Image.fromarray(render(scene))


def describe(scene: Scene) -> str:
    """A scene in words: ``red circle, blue star on gray, flat``."""
    things = ", ".join(f"{t.colour} {t.shape}" for t in scene.things) or "nothing"
    return f"{things} on {scene.background}, {scene.style}"


class Suite:
    """The exact world: 512 prompts and 512 edits of 64-pixel scenes, scored as facts.

    Another ``seed`` draws other tasks of the same kind; results are quoted for the default one.
    """

    name = "scenes"
    version = "1"
    scale = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
    share = {"generation": True, "editing": False}
    subsets: dict[str, tuple[str, ...]] = {}
    rules = {
        "scorer": "exact: the scene is read from the picture and compared fact by fact",
        "generation": "share of correct pictures",
        "editing": "O = sqrt(SC * PQ) of each item, from 0 to 10",
        "overall": "unweighted mean of the category means",
        "data": "drawn from the test split's seed",
    }

    def __init__(self, tier: str = "cells", split: str = "test", seed: int = 0):
        self.tier, self.split, self.seed = tier, split, seed
        self._drawn: dict[str, Sequence[Prompt | Edit]] = {}

    def generation_items(self, limit: int | None = None) -> list[Item]:
        """The first ``limit`` of the 512 prompts, the six categories in turn."""
        return self._items("prompts", limit)

    def editing_items(self, limit: int | None = None) -> list[Item]:
        """The first ``limit`` of the 512 edits, the six categories in turn."""
        return self._items("edits", limit)

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Capability -> the first ``limit`` of the 64 items of each probe."""
        found: dict[str, list[Item]] = {"generation": [], "editing": []}
        for probe, capability in PROBES.items():
            found[capability] += self._items(probe, limit)
        return found

    @cached_property
    def protocol(self) -> str:
        """sha256 over the version and everything that the suite asks and expects, probes included."""
        facts: list[Any] = [self.name, self.version, self.tier, self.split, self.seed]
        for name in DRAWN:
            for task in self._tasks(name):
                if isinstance(task, Prompt):
                    facts.append([name, task.record(), task.scene.key()])
                else:
                    scenes = [task.source.key(), task.target.key()]
                    facts.append([name, task.task_type, task.instruction, task.goal, *scenes])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def place(self, item: Item) -> str:
        """A folder for each category."""
        return f"{item.category}/{item.key}.png"

    def source_place(self, item: Item) -> str | None:
        """No copies of sources beside the pictures."""
        return None

    def score(self, items: Sequence[Item], images: Sequence[Any]) -> list[SceneScore]:
        """One score an item; images are PIL or uint8 (64, 64, 3), in the order of the items."""
        if len(items) != len(images):
            raise UserError(
                f"{len(items)} items of suite scenes got {len(images)} images: give one image an item"
            )
        return [_score(item, reading) for item, reading in zip(items, read_many(images, self.tier))]

    def summarise(self, scores: Sequence[SceneScore]) -> dict[str, Any]:
        """Sums up one model's scores as plain JSON; a figure is ``{mean, n, low, high}`` (95 % interval).

        ``generation``: overall, categories, diversity. ``editing``: overall, groups (local, global), categories,
        exact (share). ``probes``: by name. Only what was scored is there.
        """
        main = [s for s in scores if s.item is not None and s.item.probe is None]
        out: dict[str, Any] = {}
        by = _by_category(main, TAGS)
        if by:
            drawn = [
                (s.item.task, s.reading.scene)
                for s in main
                if s.item and s.reading and s.item.category in TAGS
            ]
            out["generation"] = _sums(by, share=True) | {"diversity": diversity(drawn)}
        by = _by_category(main, TASKS)
        if by:
            groups = {"local": LOCAL, "global": GLOBAL}
            parts = {name: [by[task] for task in tasks if task in by] for name, tasks in groups.items()}
            exact = _by_category(main, TASKS, "correct")
            out["editing"] = _sums(by, share=False) | {
                "groups": {name: compare.macro(values, False) for name, values in parts.items() if values},
                "exact": compare.macro(list(exact.values()), True),
            }
        for probe, capability in PROBES.items():
            values = [s.value for s in scores if s.item is not None and s.item.probe == probe]
            if values:
                out.setdefault("probes", {})[probe] = compare.mean(values, capability == "generation")
        return out

    def ceiling(
        self, roundtrip: Callable[[list[Image.Image]], list[Any]], limit: int | None = 96
    ) -> dict[str, Any]:
        """What perfect pictures get after an autoencoder's round trip (images -> images, as many).

        ``{"read", "n", "generation", "editing"}``: the share of scenes that are read right to the last fact out of
        ``n``, and for each capability ``{"overall", "categories"}`` of the first ``limit`` items as means.
        """
        out: dict[str, Any] = {}
        right: list[bool] = []
        for capability, items in (
            ("generation", self.generation_items(limit)),
            ("editing", self.editing_items(limit)),
        ):
            scenes = [i.task.scene if capability == "generation" else i.task.target for i in items]
            scores = self.score(items, roundtrip([picture(scene) for scene in scenes]))
            right += [
                s.reading is not None and s.reading.scene.key() == c.key() for s, c in zip(scores, scenes)
            ]
            means = {c: float(np.mean(v)) for c, v in _by_category(scores, TAGS + TASKS).items()}
            out[capability] = {"overall": float(np.mean(list(means.values()))), "categories": means}
        return {"read": float(np.mean(right)), "n": len(right), **out}

    def _tasks(self, name: str) -> Sequence[Prompt | Edit]:
        """Everything that a set asks, drawn once."""
        if name not in self._drawn:
            more: dict[str, Any] = {"seed": self.seed, "tier": self.tier}
            number = PROBE_SIZE if name in PROBES else SIZE
            self._drawn[name] = DRAWN[name](self.split, number, **more)
        return self._drawn[name]

    def _items(self, name: str, limit: int | None) -> list[Item]:
        """The first items of a set; a task that comes twice gets two keys."""
        seen: Counter[str] = Counter()
        items = []
        for task in self._tasks(name)[:limit]:
            drawn = isinstance(task, Prompt)
            scenes = (task.scene,) if isinstance(task, Prompt) else (task.source, task.target)
            words = task.prompt if isinstance(task, Prompt) else task.instruction
            facts = "\n".join([self.name, name, words, *(scene.key() for scene in scenes)])
            seen[facts] += 1
            items.append(
                Item(
                    key=hashlib.sha256(f"{facts}\n{seen[facts]}".encode()).hexdigest()[:12],
                    capability="generation" if drawn else "editing",
                    group=task.group if isinstance(task, Edit) else "generation",
                    category=task.task_type if isinstance(task, Edit) else task.tag,
                    prompt=words,
                    probe=name if name in PROBES else None,
                    source=None if drawn else picture(scenes[0]),
                    target=None if drawn else picture(scenes[-1]),
                    task=task,
                    heldout=bool(task.heldout),
                )
            )
        return items


def _score(item: Item, reading: Reading) -> SceneScore:
    sure: dict[str, Any] = {
        "psnr": reading.psnr,
        "unexplained": reading.unexplained,
        "item": item,
        "reading": reading,
    }
    seen = describe(reading.scene)
    if isinstance(item.task, Prompt):
        verdict = score_prompt(item.task, reading)
        return SceneScore(float(verdict.correct), verdict.correct, verdict.reason, seen, **sure)
    edit = score_edit(item.task, reading)
    return SceneScore(
        edit.o,
        edit.exact,
        "; ".join(edit.reasons),
        seen,
        sc=edit.sc,
        pq=edit.pq,
        success=edit.success,
        over_editing=edit.over_editing,
        naturalness=edit.naturalness,
        artifacts=edit.artifacts,
        target_psnr=edit.target_psnr,
        **sure,
    )


def _by_category(
    scores: Sequence[SceneScore], order: Sequence[str], what: str = "value"
) -> dict[str, list[float]]:
    """Category -> values, in the order given, without empty ones."""
    found: dict[str, list[float]] = {category: [] for category in order}
    for score in scores:
        if score.item is not None and score.item.category in found:
            found[score.item.category].append(float(getattr(score, what)))
    return {category: values for category, values in found.items() if values}


def _sums(by: dict[str, list[float]], share: bool) -> dict[str, Any]:
    categories = {category: compare.mean(values, share) for category, values in by.items()}
    return {"overall": compare.macro(list(by.values()), share), "categories": categories}
