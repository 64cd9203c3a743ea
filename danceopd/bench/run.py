"""Run a bench: every model draws the same prompts and edits from the same noise, and a suite scores the pictures.

Four steps, each of which continues where it was stopped: who is compared and what is asked (no weight loaded), the
drawing of what is missing (`draw`, over one process or many), the scoring of what is there (`score`, by the suite or a
judge), and the summing up (`scores.json`, `report.html`). Pictures that were made elsewhere join at the scoring. The
folder belongs to one set of items, models and seeds, which `bench.json` names; judges and scores can be asked again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from danceopd.bench.draw import Drawing, Drawn, Journal, Missing, Progress, missing_pictures, seed_of
from danceopd.bench.models import Lineup, line_up, pictures_of
from danceopd.bench.pictures import Pictures
from danceopd.bench.report import report as write_report
from danceopd.bench.score import Scoring
from danceopd.bench.scores import summarise
from danceopd.bench.suites import Item, judged, suite_items, suite_named
from danceopd.bench.trained import field_gap, watched
from danceopd.disk import disk_faults, lock, replace_file, sweep
from danceopd.errors import UserError
from danceopd.extract import device_of
from danceopd.machine import describe
from danceopd.pipelines.families import family_of
from danceopd.processes import Processes
from danceopd.recipe import Recipe
from danceopd.work import call_of

__all__ = ["Bench", "BenchResult", "bench", "seed_of"]

CEILING = 96
"""Items a capability that the ceiling is measured on."""
MARK = "bench.json"


@dataclass(frozen=True)
class BenchResult:
    """A finished bench: its folder, what `scores.json` and `samples.jsonl` hold, and the report's path.

    Of several processes the first has it (`first`); the others only drew, and hold nothing.
    """

    folder: Path
    scores: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    report: Path = Path()
    first: bool = True

    def overall(self, model: str, capability: str) -> float:
        """A model's overall score: share correct in generation, the suite's score in editing."""
        found = next(m for m in self.scores["models"] if m["name"] == model)
        return found[capability]["overall"]["mean"]


def bench(
    student: str | Path | None = None,
    suite: str = "scenes",
    against: Sequence[str] | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> BenchResult:
    """Score a student beside what it came from; `Bench` says what the options are."""
    return Bench(student, suite, against, output, **options).run()


def _silent(done: int, total: int, what: str) -> None:
    pass


@dataclass
class Bench:
    """What is compared, on what, and how it is scored; `run` does it, `estimate` says what it would take.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name; None with `images`.
    `against`: see `line_up`; nothing given means base, teachers and blend, and "none" nobody. `output`: by default
    `bench` inside the student's folder. `limit`: items a capability. `probes` adds held-out and compound items.
    `batch`: pictures drawn at once, by default what their size allows. `blend_weights`: shares of the first teacher to
    try, or one weight a teacher by name; `blend_methods`: ways to blend (`blend.METHODS`). The best blend stands in
    the table, the others in the report.

    `categories`: only these. `only_score` draws nothing and loads no model. `images`: folders of pictures made
    elsewhere in the suite's official tree, by name. `judge`: who scores a judged suite (`judges.judge_named`), "none"
    for pictures and judge-free metrics only; with its `judge_options`, asked `repeats` times, for at most `max_cost`
    dollars. `data`, `language`, `official_prompts`, `samples` (pictures a prompt): the suite's own. `features`: what
    sees each edit (`features.networks`). Raises UserError for anything a user can mend.
    """

    student: str | Path | None = None
    suite: str = "scenes"
    against: Sequence[str] | None = None
    output: str | Path | None = None
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    probes: bool = False
    batch: int | None = None
    progress: Progress = _silent
    blend_weights: Sequence[float] | Mapping[str, float] = ()
    recipe: Recipe | None = None
    blend_methods: Sequence[str] = ("linear",)
    categories: Sequence[str] = ()
    only_score: bool = False
    images: Mapping[str, str | Path] = field(default_factory=dict)
    data: str | Path | None = None
    judge: str | None = None
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 1
    max_cost: float | None = None
    language: str | None = None
    official_prompts: str | Path | None = None
    samples: int | None = None
    features: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("limit", self.limit, 1), ("batch", self.batch, 1), ("seed", self.seed, 0), ("samples", self.samples, 1),
            ("repeats", self.repeats, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                hint = ", or leave it out for the whole suite" if name == "limit" else ""
                raise UserError(f"--{name} is {value}; give {least} or more{hint}")
        if self.student is None and not self.images:
            raise UserError("there is nothing to score; give a student, or --images NAME=FOLDER")

    def run(self) -> BenchResult:
        """Draw what is missing, score what is there, and write `scores.json`, `samples.jsonl` and `report.html`.

        The same call again continues an interrupted bench. In several processes each draws its share.
        """
        started = time.perf_counter()
        processes = Processes(self.device if self._draws else "cpu")
        journal, held = Journal(self.folder), None
        seconds: dict[str, Any] = {"models": {}}
        try:
            missing: Missing = {}
            with processes.first():
                if processes.main:
                    self._check()
                    if self.session is not None:
                        self.session.judge.check()
                    held = self._open()
                    missing = missing_pictures(self.lineup, self.items, journal.merge()) if self._draws else {}
            missing = processes.said(missing)
            if missing:
                progress = self.progress if processes.main else _silent
                how = (self.call or {}, self.seed, self.batch, processes, progress)
                seconds = Drawing(self.lineup, self.items, self.pictures, *how).run(missing, self._measure_ceiling)
            if not processes.main:
                return BenchResult(self.folder, first=False)
            return self._scored(self._scoring(journal.merge()), seconds, started, processes)
        finally:
            if held is not None:
                held.close()

    def estimate(self) -> dict:
        """What `run` would take, as plain JSON: `items`, `models`, `pictures` to draw and `judge`.

        `judge` has questions, tokens and dollars, None where no judge is asked. Nothing is asked and nothing written.
        """
        self._check()
        drawn = Journal(self.folder).read() if (self.folder / MARK).is_file() else {}
        lost = missing_pictures(self.lineup, self.items, drawn) if self._draws else {}
        found: dict[str, Any] = {
            "items": {c: len(items) for c, items in self.items.items()},
            "models": [m.label for m in self.lineup.models],
            "pictures": sum(len(rows) for found in lost.values() for rows in found.values()),
            "judge": None,
        }
        session = self.session
        if session is not None:
            asked = session.estimate(self._scoring(drawn).questions())
            found["judge"] = {"name": self.judge, **vars(asked)}
        return found

    # -- what is asked, of whom ----------------------------------------------------------------------------

    @cached_property
    def chosen(self) -> Any:
        """The suite."""
        return suite_named(
            self.suite,
            data=self.data and Path(self.data).expanduser(),
            language=self.language,
            official_prompts=self.official_prompts and Path(self.official_prompts).expanduser(),
            samples=self.samples,
        )

    @cached_property
    def lineup(self) -> Lineup:
        """Who is compared."""
        folders = {name: Path(folder).expanduser() for name, folder in self.images.items()}
        if self.student is None:
            return pictures_of(folders)
        words = [word for word in self.against or () if word]
        named = [] if words == ["none"] else words or None
        made = line_up(self.student, named, self.blend_weights, self.recipe, self.blend_methods)
        return pictures_of(folders, made) if folders else made

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """capability -> items."""
        return suite_items(self.chosen, self.limit, self.probes, self.categories)

    @cached_property
    def folder(self) -> Path:
        """Where everything is written."""
        if self.output is not None:
            return Path(self.output)
        if self.student is None:
            return Path("bench")
        path = Path(self.student)
        return path / "bench" if path.is_dir() else Path("bench") / path.stem

    @cached_property
    def pictures(self) -> Pictures:
        """Where the pictures lie."""
        return Pictures(self.folder, self.chosen)

    @cached_property
    def call(self) -> dict[str, Any] | None:
        """How the pipelines are called; None where nobody draws."""
        lineup = self.lineup
        if lineup.folder is None:
            return None
        return call_of(lineup.folder, lineup.call, family_of(lineup.folder, lineup.family))

    @cached_property
    def session(self) -> Any:
        """The judge's session; None where no judge is asked. UserError where one is missing, or is too many."""
        if not judged(self.chosen):
            if self.judge not in (None, "none"):
                raise UserError(f"suite {self.suite} scores by itself and asks no judge; leave --judge out")
            return None
        if self.judge is None:
            raise UserError(
                f"suite {self.suite} asks a judge; give --judge openai:MODEL@URL, hf:PATH, cmd:PROGRAM or replay:FILE, "
                "or --judge none for pictures and judge-free metrics only"
            )
        if self.judge == "none":
            return None
        from danceopd.bench.judges import Session, judge_named

        judge = judge_named(self.judge, **self.judge_options)
        return Session(judge, self.folder / "judge.jsonl", self.repeats, self.max_cost)

    @cached_property
    def networks(self) -> Any:
        """What sees each edit besides the judge."""
        if not self.features:
            return ()
        from danceopd.bench.features import networks

        return networks(self.features, device_of(self.device).type)

    @property
    def identity(self) -> dict[str, Any]:
        """What the pictures of this folder are."""
        suite = self.chosen
        found = {"suite": suite.name, "version": suite.version, "protocol": suite.protocol, "seed": self.seed}
        found |= {"limit": self.limit, "probes": self.probes, "call": self.call}
        found |= {"categories": sorted(self.categories)} if self.categories else {}
        found["models"] = {m.name: m.sha256 or str(m.pictures and m.pictures.absolute()) for m in self.lineup.models}
        return json.loads(json.dumps(found))

    @property
    def _draws(self) -> bool:
        return not self.only_score and self.lineup.folder is not None

    def _scoring(self, drawn: Drawn) -> Scoring:
        given = (self.chosen, self.lineup, self.items, self.pictures, self.seed, drawn, self.progress, self.networks)
        return Scoring(*given)

    def _check(self) -> None:
        """Everything that can be refused before a model is loaded or a folder is made."""
        _ = self.session, self.items, self.identity, self.networks
        place = self.folder
        if place.is_dir() and not (place / MARK).is_file() and any(p.name != ".lock" for p in place.iterdir()):
            raise UserError(f"output folder {place} holds files that are not a bench; choose another --output")
        self._same()
        pictured = any(m.pictures is not None for m in self.lineup.models)
        if self.only_score and not pictured and not any(self._there()):
            raise UserError(
                f"there is no picture to score in {self.folder / 'images'}; draw them first, without --only-score"
            )

    def _there(self) -> Any:
        for model in self.lineup.models:
            for items in self.items.values():
                yield from (self.pictures.found(model.name, item) for item in items)

    def _same(self) -> None:
        """UserError where the folder holds another bench."""
        mark = self.folder / MARK
        if not mark.is_file():
            return
        with suppress(ValueError):
            known, mine = json.loads(mark.read_text(encoding="utf-8")), self.identity
            other = [key for key in {**mine, **known} if known.get(key) != mine.get(key)]
            if not other:
                return
            raise UserError(
                f"output folder {self.folder} holds another bench (of other {', '.join(other)}); choose another "
                "--output, or delete that folder"
            )
        raise UserError(
            f"output folder {self.folder} holds a bench whose {MARK} is damaged; choose another "
            "--output, or delete that folder"
        )

    # -- doing it ------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """The folder's lock, with everything in place that scoring needs besides the pictures drawn."""
        with disk_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(self.folder / ".lock")
            sweep(self.folder)
        try:
            every = [item for items in self.items.values() for item in items]
            folders = {m.name: m.pictures for m in self.lineup.models if m.pictures is not None}
            self.pictures.take(folders, every)
            self._same()
            if not (self.folder / MARK).is_file():
                _write_json(self.folder / MARK, self.identity)
            self.pictures.keep_beside(every)
        except BaseException:
            if held is not None:
                held.close()
            raise
        return held

    def _measure_ceiling(self, stage: Any) -> None:
        """What right pictures score after the autoencoder's round trip, kept beside the samples."""
        file = self.folder / "ceiling.json"
        if hasattr(self.chosen, "ceiling") and not file.is_file():
            self.progress(0, 1, "ceiling")
            _write_json(file, self.chosen.ceiling(stage.round_trip, min(self.limit or CEILING, CEILING)))

    def _scored(self, scoring: Scoring, seconds: dict, started: float, processes: Processes) -> BenchResult:
        rows = scoring.run(self.session)
        self.progress(0, 1, "report")
        ceiling = self.folder / "ceiling.json"
        settings = {
            "seed": self.seed,
            "limit": self.limit,
            "categories": list(self.categories),
            "call": self.call,
            "judge": self.session and self.session.judge.identity,
            "judging": self.session and self._judging(),
            "pictures": self._sets(rows),
            "watch": watched(self.student),
            "field_gap": field_gap(self.student),
            "ceiling": json.loads(ceiling.read_text(encoding="utf-8")) if ceiling.is_file() else None,
            "machine": describe(str(processes.device)),
            "seconds": seconds | {"total": round(time.perf_counter() - started, 2)},
        }
        scores = summarise(rows, self.lineup, self.chosen, settings)
        _write_json(self.folder / "scores.json", scores)
        found = BenchResult(self.folder, scores, rows, write_report(self.folder))
        self.progress(1, 1, "report")
        return found

    def _judging(self) -> dict:
        found = {"repeats": self.session.repeats, "usage": self.session.usage, "stopped": self.session.stopped}
        return found | {"agreement": self.session.agreement()}

    def _sets(self, rows: Sequence[dict]) -> dict[str, dict]:
        """model -> what its pictures are as a set: near-duplicates, constant ones."""
        from danceopd.bench.metrics import measure_set

        found: dict[str, dict] = {m.name: {} for m in self.lineup.models}
        for row in rows:
            if row["image"] is not None:
                found[row["model"]][row["key"]] = self.folder / row["image"]
        return {model: measure_set(images) for model, images in found.items()}


def _write_json(path: Path, value: Any) -> None:
    with disk_faults(path):
        replace_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
