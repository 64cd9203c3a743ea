"""The ``scenes`` suite: synthetic 64-pixel scenes whose right answers are known, scored exactly and without a judge.

512 prompts and 512 edits of the test split: GenEval's six categories and six of GEdit's. Reported apart are the probes:
held-out bindings and operations, compound edits, five objects. Generation is the share of correct images (0 to 1),
editing the mean O (0 to 10), each the mean of six category means. Read every score beside the ceiling: what correct
images score after the autoencoder's round trip, which no model behind that autoencoder can beat.

`WorldSuite` is the part that is shared with ``openmoji``, the other suite of a world whose answers can be computed.
`diversity` compares what a model varies freely (colours, places, backgrounds) with how the training data varies it.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from danceopd.bench import statistics
from danceopd.bench.suites.protocol import ExactSuite, Item, RoundTrip, Score
from danceopd.worlds.scenes.edits import GLOBAL, LOCAL, PROBE_TASKS, TASKS, Edit, edits
from danceopd.worlds.scenes.grammar import BACKGROUNDS, CELL, COLOURS, GRID, Scene, allowed_colours
from danceopd.worlds.scenes.prompts import PROBE_TAGS, TAGS, Prompt, prompts
from danceopd.worlds.scenes.read import Reading, read_many
from danceopd.worlds.scenes.render import render
from danceopd.worlds.scenes.score import score_edit, score_prompt

SIZE, PROBE_SIZE = 512, 64
PROBES = {
    "held-out binding": "generation",
    "five objects": "generation",
    "held-out edit binding": "editing",
    "held-out operation": "editing",
    "compound": "editing",
}
"""Sets that are reported apart, and the capability of each."""
SETS: dict[str, Callable[..., Sequence[Prompt | Edit]]] = {
    "prompts": prompts,
    "edits": edits,
    "held-out binding": partial(prompts, heldout=True),
    "five objects": partial(prompts, tags=PROBE_TAGS),
    "held-out edit binding": partial(edits, heldout="binding"),
    "held-out operation": partial(edits, heldout="operation"),
    "compound": partial(edits, tasks=PROBE_TASKS),
}
"""How the tasks of each set are sampled."""
EDIT_PARTS = ("sc", "pq", "success", "over_editing", "naturalness", "artifacts", "target_psnr")


@dataclass(frozen=True)
class WorldScore(Score):
    """The score of one image of a computable world.

    ``value`` is 0 or 1 for generation and O from 0 to 10 for editing; ``correct`` means that every fact holds.
    ``sc`` to ``target_psnr`` are the parts of an edit's score (None for generation). ``seen`` says in words what was
    read from the image; ``psnr`` (dB) and ``unexplained`` (share of pixels) say how well the reading explains it, and
    so does ``likeness``, the lowest cosine of an outline with its class (None where outlines are not matched).
    """

    seen: str = ""
    psnr: float = 0.0
    unexplained: float = 0.0
    likeness: float | None = None
    sc: float | None = None
    pq: float | None = None
    success: float | None = None
    over_editing: float | None = None
    naturalness: float | None = None
    artifacts: float | None = None
    target_psnr: float | None = None
    item: Item | None = field(default=None, repr=False, compare=False)
    reading: Any = field(default=None, repr=False, compare=False)


def world_score(item: Item, reading: Any, found: Any, likeness: float | None = None) -> WorldScore:
    """The world's own result `found` of a prompt or an edit, with what was read from the image, as one score."""
    seen: dict[str, Any] = {"seen": describe(reading.scene), "psnr": reading.psnr, "unexplained": reading.unexplained}
    seen |= {"likeness": likeness, "item": item, "reading": reading}
    if isinstance(item.task, Prompt):
        return WorldScore(float(found.correct), found.correct, found.reason, **seen)
    parts = {part: getattr(found, part) for part in EDIT_PARTS}
    return WorldScore(found.o, found.exact, "; ".join(found.reasons), **seen, **parts)


def describe(scene: Scene) -> str:
    """A scene in words: ``red circle, blue star on gray, flat``."""
    things = ", ".join(t.shape if t.shape == "something" else f"{t.colour} {t.shape}" for t in scene.things)
    return f"{things or 'nothing'} on {scene.background}, {scene.style}"


def render_image(scene: Scene) -> Image.Image:
    """A scene as a 64x64 RGB image."""
    return Image.fromarray(render(scene))


class WorldSuite(ExactSuite):
    """Prompts and edits of a computable world: generation is right or wrong, an edit gets O from 0 to 10."""

    scale = {"generation": (0.0, 1.0), "editing": (0.0, 10.0)}
    share = {"generation": True, "editing": False}
    exact = ("editing",)

    @abstractmethod
    def _rendered(self, scene: Scene) -> Image.Image:
        """The right image of a scene."""

    @abstractmethod
    def _is_read(self, score: WorldScore, scene: Scene) -> bool:
        """Whether every fact of the scene was read from its image."""

    def ceiling(self, roundtrip: RoundTrip, limit: int | None = 96) -> dict[str, Any]:
        """What correct images score after an autoencoder's round trip.

        ``{"read", "n", "generation", "editing"}``: the share of ``n`` images of which every fact is read correctly, and
        for each capability ``{"overall", "categories"}``, the means of the first ``limit`` items; of editing also
        ``exact``, the same of the shares with all facts right.
        """
        out: dict[str, Any] = {}
        read: list[bool] = []
        both = {"generation": self.generation_items(limit), "editing": self.editing_items(limit)}
        for capability, items in both.items():
            scenes = [i.task.scene if capability == "generation" else i.task.target for i in items]
            scores = self.score(items, roundtrip([self._rendered(scene) for scene in scenes]))
            read += [self._is_read(score, scene) for score, scene in zip(scores, scenes)]
            out[capability] = _ceiling(scores, "value")
            if capability in self.exact:
                out[capability]["exact"] = _ceiling(scores, "correct")
        return {"read": float(np.mean(read)), "n": len(read), **out}


class Suite(WorldSuite):
    """512 prompts and 512 edits of 64-pixel scenes. Results are quoted for ``seed`` 0; another one samples others."""

    name = "scenes"
    version = "1"
    rules = {
        "scorer": "exact: the scene is read from the image and compared fact by fact",
        "generation": "share of correct images",
        "editing": "O = sqrt(SC * PQ) of each item, from 0 to 10",
        "overall": "unweighted mean of the category means",
        "data": "sampled from the test split by the seed",
    }

    def __init__(self, tier: str = "cells", split: str = "test", seed: int = 0):
        self.tier, self.split, self.seed = tier, split, seed
        self._sampled: dict[str, Sequence[Prompt | Edit]] = {}

    def generation_items(self, limit: int | None = None) -> list[Item]:
        return self._items("prompts", limit)

    def editing_items(self, limit: int | None = None) -> list[Item]:
        return self._items("edits", limit)

    def probe_items(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Capability -> the first ``limit`` of the 64 items of each probe."""
        found: dict[str, list[Item]] = {"generation": [], "editing": []}
        for probe, capability in PROBES.items():
            found[capability] += self._items(probe, limit)
        return found

    @cached_property
    def protocol(self) -> str:
        """sha256 over the version and everything that is asked and expected, probes included."""
        facts: list[Any] = [self.name, self.version, self.tier, self.split, self.seed]
        for name in SETS:
            for task in self._tasks(name):
                if isinstance(task, Prompt):
                    facts.append([name, task.record(), task.scene.key()])
                else:
                    scenes = [task.source.key(), task.target.key()]
                    facts.append([name, task.task_type, task.instruction, task.goal, *scenes])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def summarise(self, scores: Sequence[WorldScore]) -> dict[str, Any]:
        """One model's scores as plain JSON; a figure is ``{mean, n, low, high, …}`` with a 95 % interval.

        ``generation``: overall, categories, diversity. ``editing``: overall, groups (local, global), categories,
        exact (the share with full marks). ``probes``: by name. Only what was scored is there.
        """
        main = [s for s in scores if s.item is not None and s.item.probe is None]
        out: dict[str, Any] = {}
        by = _by_category(main, TAGS)
        if by:
            read = [(s.item.task, s.reading.scene) for s in main if s.item and s.reading and s.item.category in TAGS]
            out["generation"] = _sums(by, share=True) | {"diversity": diversity(read)}
        by = _by_category(main, TASKS)
        if by:
            groups = {"local": LOCAL, "global": GLOBAL}
            parts = {name: [by[task] for task in tasks if task in by] for name, tasks in groups.items()}
            exact = _by_category(main, TASKS, "correct")
            out["editing"] = _sums(by, share=False) | {
                "groups": {name: statistics.macro(values, False) for name, values in parts.items() if values},
                "exact": statistics.macro(list(exact.values()), True),
            }
        for probe, capability in PROBES.items():
            values = [s.value for s in scores if s.item is not None and s.item.probe == probe]
            if values:
                out.setdefault("probes", {})[probe] = statistics.mean(values, capability == "generation")
        return out

    def _scores(self, items: Sequence[Item], images: Sequence[Any]) -> list[WorldScore]:
        return [_score(item, reading) for item, reading in zip(items, read_many(images, self.tier))]

    def _rendered(self, scene: Scene) -> Image.Image:
        return render_image(scene)

    def _is_read(self, score: WorldScore, scene: Scene) -> bool:
        return score.reading is not None and score.reading.scene.key() == scene.key()

    def _tasks(self, name: str) -> Sequence[Prompt | Edit]:
        """The tasks of a set, sampled once."""
        if name not in self._sampled:
            number = PROBE_SIZE if name in PROBES else SIZE
            self._sampled[name] = SETS[name](self.split, number, seed=self.seed, tier=self.tier)
        return self._sampled[name]

    def _items(self, name: str, limit: int | None) -> list[Item]:
        """The first items of a set; a task that comes twice gets two keys."""
        seen: Counter[str] = Counter()
        items = []
        for task in self._tasks(name)[:limit]:
            generation = isinstance(task, Prompt)
            scenes = (task.scene,) if isinstance(task, Prompt) else (task.source, task.target)
            prompt = task.prompt if isinstance(task, Prompt) else task.instruction
            facts = "\n".join([self.name, name, prompt, *(scene.key() for scene in scenes)])
            seen[facts] += 1
            items.append(
                Item(
                    key=hashlib.sha256(f"{facts}\n{seen[facts]}".encode()).hexdigest()[:12],
                    capability="generation" if generation else "editing",
                    group=task.group if isinstance(task, Edit) else "generation",
                    category=task.task_type if isinstance(task, Edit) else task.tag,
                    prompt=prompt,
                    probe=name if name in PROBES else None,
                    source=None if generation else render_image(scenes[0]),
                    target=None if generation else render_image(scenes[-1]),
                    task=task,
                    heldout=bool(task.heldout),
                )
            )
        return items


def _score(item: Item, reading: Reading) -> WorldScore:
    check = score_prompt if isinstance(item.task, Prompt) else score_edit
    return world_score(item, reading, check(item.task, reading))


def _by_category(scores: Sequence[WorldScore], order: Sequence[str], what: str = "value") -> dict[str, list[float]]:
    """Category -> values, in the order given, without empty ones."""
    found: dict[str, list[float]] = {category: [] for category in order}
    for score in scores:
        if score.item is not None and score.item.category in found:
            found[score.item.category].append(float(getattr(score, what)))
    return {category: values for category, values in found.items() if values}


def _ceiling(scores: Sequence[WorldScore], what: str) -> dict[str, Any]:
    means = {c: float(np.mean(v)) for c, v in _by_category(scores, TAGS + TASKS, what).items()}
    return {"overall": float(np.mean(list(means.values()))), "categories": means}


def _sums(by: dict[str, list[float]], share: bool) -> dict[str, Any]:
    categories = {category: statistics.mean(values, share) for category, values in by.items()}
    return {"overall": statistics.macro(list(by.values()), share), "categories": categories}


FREE_COLOURS = ("single_object", "two_object", "counting", "position")
"""Categories whose prompts state no colour."""
FREE_PLACES = ("single_object", "two_object", "counting", "colors", "color_attr")
"""Categories whose prompts state no place."""
RESAMPLES = 400


def total_variation(counts: np.ndarray, expected: np.ndarray) -> dict[str, float | int]:
    """``{distance, chance, n}``: the total variation distance of counts (k,) from probabilities (k,).

    ``chance`` is the mean distance of as many samples that do follow ``expected``.
    """
    number = int(counts.sum())
    sampled = np.random.default_rng(0).multinomial(number, expected, RESAMPLES) / number
    chance = float(np.abs(sampled - expected).sum(1).mean() / 2)
    distance = float(np.abs(counts / number - expected).sum() / 2)
    return {"distance": round(distance, 4), "chance": round(chance, 4), "n": number}


def _colours(read: Sequence[tuple[Prompt, Scene]]) -> tuple[Counter, np.ndarray]:
    """Counts of colours where none is stated, and what is expected: uniform over those of the training data."""
    counts: Counter[int] = Counter()
    expected = np.zeros(len(COLOURS))
    for prompt, scene in read:
        for thing in scene.things if prompt.tag in FREE_COLOURS else ():
            counts[COLOURS.index(thing.colour)] += 1
            allowed = allowed_colours(thing.shape, False)
            expected[[COLOURS.index(colour) for colour in allowed]] += 1 / len(allowed)
    return counts, expected


def diversity(read: Sequence[tuple[Prompt, Scene]]) -> dict[str, dict[str, float | int]]:
    """How (prompt, scene read from the image) pairs vary what the prompt leaves open, against the training data.

    `total_variation` of ``colour``, ``place`` (16 cells) and ``background``. The prompts are those of the test split,
    which name no background.
    """
    places: Counter[int] = Counter()
    for prompt, scene in read:
        for thing in scene.things if prompt.tag in FREE_PLACES else ():
            places[int(thing.y // CELL) * GRID + int(thing.x // CELL)] += 1
    backgrounds = Counter(BACKGROUNDS.index(scene.background) for _, scene in read)
    uniform = {size: np.full(size, 1 / size) for size in (GRID * GRID, len(BACKGROUNDS))}
    factors = {"colour": _colours(read), "place": (places, uniform[GRID * GRID])}
    factors["background"] = (backgrounds, uniform[len(BACKGROUNDS)])
    return {
        name: total_variation(np.array([seen[i] for i in range(len(law))], float), law / law.sum())
        for name, (seen, law) in factors.items()
        if seen
    }
