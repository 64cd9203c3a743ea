"""Run a bench: every model generates the same items from the same noise, and a suite scores the images.

Four steps, each of which continues where it was stopped: choose the models and the items (no weights are loaded),
generate the missing images (generate.py, in one process or several), score them (scoring.py, by the suite or a judge),
and write `scores.json` and `report.html`. Images made elsewhere join at the scoring. A folder belongs to one set of
items, models and seeds, which `bench.json` records; it can be judged and scored again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from danceopd.bench.evidence.drift import drift_items, measure_drift
from danceopd.bench.evidence.second import FILE as SECOND_FILE
from danceopd.bench.evidence.second import rows_of_second, second_judge
from danceopd.bench.generate import GenerationLog, ImageGenerator, Missing, Progress, missing_images
from danceopd.bench.images import FILES, MARK, ImageStore, check_identity
from danceopd.bench.judges.registry import open_session
from danceopd.bench.lineup import Lineup, add_image_folders, build_lineup
from danceopd.bench.metrics.collapse import image_sets
from danceopd.bench.metrics.own import load_measures
from danceopd.bench.options import BlendOptions, JudgeOptions, SuiteOptions
from danceopd.bench.report.card import add_to_card
from danceopd.bench.report.report import report as write_report
from danceopd.bench.report.training import about_training
from danceopd.bench.report.verdict import MARGIN, check_margin
from danceopd.bench.results import BenchResult, summarise, used_plugins
from danceopd.bench.scoring import Scoring
from danceopd.bench.suites.protocol import ExactSuite, Item, JudgedSuite, Suite
from danceopd.bench.suites.registry import drawable, load_suite, of_pictures, suite_items
from danceopd.common.distributed import Processes
from danceopd.common.files import disk_errors, lock_file, remove_partial_files, write_json
from danceopd.common.system import describe_machine, redacted
from danceopd.errors import UserError
from danceopd.models.base import pipeline_call
from danceopd.pipelines.registry import family_of
from danceopd.plugins import name_of
from danceopd.recipe.recipe import Recipe

if TYPE_CHECKING:
    from danceopd.bench.host import ModelHost
    from danceopd.bench.judges.session import JudgeSession
    from danceopd.bench.metrics.features import Network

CEILING = 96
"""Items of each capability on which the ceiling is measured."""


def bench(
    student: str | Path | None = None,
    suite: str | Suite | type[Suite] = "scenes",
    against: Sequence[str] | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> BenchResult:
    """Score a student against the models that it came from, on the same items from the same noise.

    `student` is a run folder, a LoRA or a pipeline; `suite` one of `danceopd suites`; `against` names models, by
    default the base, the teachers and a blend; `output` is by default the folder `bench` in the student's. `options`
    are the further fields of `Bench`: `limit` (items of each capability), `seed`, `device`, `judge` (a
    `JudgeOptions`), and so on.

    Returns a `BenchResult`: `scores` (plain JSON: means on the suite's scale with 95 % intervals), `report` (the path
    of one self-contained page), `grid` (one labelled RGB picture), `rows` (one for each item and model). The same call
    again continues. Raises UserError for wrong input, before a model is loaded.
    """
    return Bench(student, suite, against, output, **options).run()


def _silent(done: int, total: int, what: str) -> None:
    pass


@dataclass
class Bench:
    """One bench: which models, on which items, scored how. `run` does it, `estimate` says what it would take.

    `student`: a run folder, a LoRA's folder or file, a fused pipeline's folder, or a shipped name; None with `images`.
    `against`: see `build_lineup`; nothing means base, teachers and blend, ["none"] no model. `output`: by default
    `bench` inside the student's folder. `images`: folders of images made elsewhere in the suite's official layout, by
    model name.

    `limit`: items of each capability. `categories`: only these. `probes` adds held-out and compound items. `batch`:
    images generated at once, by default what their size allows. `only_score` generates nothing and loads no model.
    `features`: networks for judge-free metrics (`features.load_networks`); `metrics`: functions of one image
    (`own.load_metrics`). `suite`, a judge, blend methods and metrics are names or objects. `drift`: "auto" or a file of
    prompts that no teacher is for, drawn for the distance from the base and diversity (evidence/drift.py). `margin`:
    the share of the scale that may be lost and still counts as nothing (verdict.py). Raises UserError for wrong input.
    """

    student: str | Path | None = None
    suite: str | Suite | type[Suite] = "scenes"
    against: Sequence[str] | None = None
    output: str | Path | None = None
    images: Mapping[str, str | Path] = field(default_factory=dict)
    recipe: Recipe | None = None
    blends: BlendOptions = field(default_factory=BlendOptions)
    limit: int | None = None
    categories: Sequence[str] = ()
    probes: bool = False
    seed: int = 0
    device: str = "auto"
    batch: int | None = None
    only_score: bool = False
    suite_options: SuiteOptions = field(default_factory=SuiteOptions)
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    features: Sequence[str] = ()
    drift: str | None = None
    metrics: Sequence[str | Callable[..., float | None]] = ()
    margin: float = MARGIN
    progress: Progress = _silent

    def __post_init__(self) -> None:
        for name, value, least in (
            ("limit", self.limit, 1), ("batch", self.batch, 1), ("seed", self.seed, 0),
            ("samples", self.suite_options.samples, 1), ("repeats", self.judge.repeats, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                hint = ", or leave it out for the whole suite" if name == "limit" else ""
                raise UserError(f"--{name} is {value}; give {least} or more{hint}")
        check_margin(self.margin)
        if self.student is None and not self.images:
            raise UserError("there is nothing to score; give a student, or --images NAME=FOLDER")

    def run(self) -> BenchResult:
        """Generate the missing images, score all, and write `scores.json`, `samples.jsonl` and `report.html`.

        The same call again continues an interrupted bench. With several processes each generates its share.
        """
        started = time.perf_counter()
        processes = Processes(self.device if self._generates else "cpu")
        log, lock = GenerationLog(self.folder), None
        seconds: dict[str, Any] = {"models": {}}
        try:
            missing: Missing = {}
            with processes.main_first():
                if processes.is_main:
                    self._check()
                    for session in filter(None, (self.session, self.second_session)):
                        session.judge.check()
                    lock = self._open()
                    missing = missing_images(self.lineup, self.generated_items, log.merge()) if self._generates else {}
            missing = processes.broadcast(missing)
            if missing:
                progress = self.progress if processes.is_main else _silent
                how = (self.call or {}, self.seed, self.batch, processes, progress)
                generator = ImageGenerator(self.lineup, self.generated_items, self.store, *how)
                with processes.watched():
                    seconds = generator.run(missing, self._measure_ceiling)
            if not processes.is_main:
                return BenchResult(self.folder, is_main=False)
            log.merge()
            return self._scored(self._scoring(), seconds, started, processes)
        finally:
            if lock is not None:
                lock.close()

    def estimate(self) -> dict:
        """What `run` would take, as plain JSON: `items`, `models`, `images` to generate, and `judge`.

        `judge` has questions, tokens and dollars, None where no judge is asked. Nothing is asked or written.
        """
        self._check()
        generated = GenerationLog(self.folder).read() if (self.folder / MARK).is_file() else {}
        missing = missing_images(self.lineup, self.generated_items, generated) if self._generates else {}
        found: dict[str, Any] = {
            "items": {c: len(items) for c, items in self.items.items()},
            "published": dict(self.loaded_suite.published),
            "models": [m.label for m in self.lineup.models],
            "images": sum(len(rows) for by_capability in missing.values() for rows in by_capability.values()),
            "judge": None,
        }
        sessions = {"judge": (self.session, self.judge.judge), "second_judge": (self.second_session, self.judge.second)}
        for which, (session, name) in sessions.items():
            if session is not None:
                scoring = self._scoring()
                cost = session.estimate(scoring.questions(), scoring.questions_to_come(missing, self.call or {}))
                found[which] = {"name": redacted(name_of("judge", name or "")), **vars(cost)}
        return found

    # -- the models, the items, the judge ------------------------------------------------------------------

    @cached_property
    def loaded_suite(self) -> Suite:
        """The suite with its data."""
        options = self.suite_options
        return load_suite(
            self.suite,
            data=options.data and Path(options.data).expanduser(),
            language=options.language,
            official_prompts=options.official_prompts and Path(options.official_prompts).expanduser(),
            samples=options.samples,
        )

    @cached_property
    def lineup(self) -> Lineup:
        """The models that are compared."""
        folders = {name: Path(folder).expanduser() for name, folder in self.images.items()}
        if self.student is None:
            return add_image_folders(folders)
        words = [word for word in self.against or () if word]
        against = [] if words == ["none"] else words or None
        lineup = build_lineup(self.student, against, self.blends.weights, self.recipe, self.blends.methods)
        return add_image_folders(folders, lineup) if folders else lineup

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """Capability -> items."""
        return drawable(suite_items(self.loaded_suite, self.limit, self.probes, self.categories), self.lineup)

    @cached_property
    def folder(self) -> Path:
        """The output folder."""
        if self.output is not None:
            return Path(self.output)
        if self.student is None:
            return Path("bench")
        path = Path(self.student)
        return path / "bench" if path.is_dir() else Path("bench") / path.stem

    @cached_property
    def store(self) -> ImageStore:
        """The images in the output folder."""
        return ImageStore(self.folder, self.loaded_suite)

    @cached_property
    def call(self) -> dict[str, Any] | None:
        """The arguments of the pipelines; None where no model generates."""
        lineup = self.lineup
        if lineup.folder is None:
            return None
        return of_pictures(pipeline_call(lineup.folder, lineup.call, family_of(lineup.folder, lineup.family)))

    @cached_property
    def session(self) -> JudgeSession | None:
        """The judge's session, None where no judge is asked. UserError if --judge is missing, or not wanted."""
        judge = self.judge.judge
        if not isinstance(self.loaded_suite, JudgedSuite):
            if judge not in (None, "none"):
                raise UserError(f"suite {self.loaded_suite.name} scores without a judge; leave --judge out")
            return None
        if judge is None:
            raise UserError(
                f"suite {self.loaded_suite.name} needs a judge; give --judge openai:MODEL@URL, hf:PATH, cmd:PROGRAM or "
                "replay:FILE, or --judge none for images and judge-free metrics only"
            )
        if judge == "none":
            return None
        file = self.folder / "judge.jsonl"
        return open_session(judge, file, self.judge.arguments, self.judge.repeats, self.judge.max_cost)

    @cached_property
    def second_session(self) -> JudgeSession | None:
        """The session of --second-judge; None without one."""
        if self.judge.second is None:
            return None
        if self.session is None:
            raise UserError("--second-judge needs a suite with a judge, and --judge for the first one")
        made = open_session(self.judge.second, self.folder / SECOND_FILE, {}, 1, self.judge.max_cost)
        if made.judge.identity == self.session.judge.identity:
            raise UserError("--second-judge is the same judge as --judge; for its agreement with itself give --repeats")
        return made

    @cached_property
    def drift_items(self) -> list[Item]:
        """The items of --drift, which are drawn and not scored."""
        if self.drift is None:
            return []
        if self.lineup.folder is None:
            raise UserError("--drift needs models that generate here; folders of images have no images of its prompts")
        return drift_items(self.drift, self.loaded_suite)

    @cached_property
    def generated_items(self) -> dict[str, list[Item]]:
        """Capability -> items to generate: those that are scored, and after them those of --drift."""
        return self.items | {"generation": [*self.items["generation"], *self.drift_items]}

    @cached_property
    def networks(self) -> tuple[Network, ...]:
        """The networks of `features`, and the functions of `metrics`."""
        return load_measures(self.features, self.metrics, self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """What the images of this folder are: suite, items, seed, call and models; the contents of `bench.json`."""
        suite = self.loaded_suite
        found = {"suite": suite.name, "version": suite.version, "protocol": suite.protocol, "seed": self.seed}
        found |= {"limit": self.limit, "probes": self.probes, "call": self.call}
        found |= {"categories": sorted(self.categories)} if self.categories else {}
        data = suite.rules.get("data")
        if isinstance(data, dict) and "pictures_sha256" in data and self.lineup.folder is not None:
            found["sources"] = data["pictures_sha256"]  # images are generated from them
        found["models"] = {
            m.name: m.sha256 or str(m.image_folder and m.image_folder.absolute()) for m in self.lineup.models
        }
        return json.loads(json.dumps(found))

    @property
    def _image_folders(self) -> dict[str, Path]:
        """The folders of images made elsewhere, by model."""
        return {m.name: m.image_folder for m in self.lineup.models if m.image_folder is not None}

    @property
    def _generates(self) -> bool:
        return not self.only_score and self.lineup.folder is not None

    def _scoring(self) -> Scoring:
        where = (self.loaded_suite, self.lineup, self.items, self.store)
        return Scoring(*where, self.seed, self.progress, self.networks)

    def _check(self) -> None:
        """UserError for everything that can be refused before a model is loaded or a folder is made."""
        _ = self.session, self.second_session, self.generated_items, self.identity, self.networks
        folder = self.folder
        if folder.is_dir() and not (folder / MARK).is_file() and any(p.name not in FILES for p in folder.iterdir()):
            raise UserError(f"output folder {folder} holds files that are not a bench; choose another --output")
        check_identity(folder, self.identity)
        imported = self._image_folders
        self.store.check_folders(imported, [item for items in self.items.values() for item in items])
        if self.only_score and not imported and not any(self._existing()):
            raise UserError(
                f"there is no image to score in {self.folder / 'images'}; generate them first, without --only-score"
            )

    def _existing(self) -> Iterator[str | None]:
        for model in self.lineup.models:
            for items in self.items.values():
                yield from (self.store.existing(model.name, item) for item in items)

    # -- the steps -----------------------------------------------------------------------------------------

    def _open(self) -> IO[str] | None:
        """Lock the folder, and write everything that scoring needs besides the generated images."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self.folder / ".lock")
            remove_partial_files(self.folder)
        try:
            every = [item for items in self.items.values() for item in items]
            self.store.import_folders(self._image_folders, every)
            check_identity(self.folder, self.identity)
            write_json(self.folder / MARK, self.identity)
            self.store.save_inputs(every)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return lock

    def _measure_ceiling(self, host: ModelHost) -> None:
        """Write `ceiling.json`: what correct images score after the autoencoder's round trip."""
        file = self.folder / "ceiling.json"
        if file.is_file() or not isinstance(self.loaded_suite, ExactSuite):
            return
        self.progress(0, 1, "ceiling")
        ceiling = self.loaded_suite.ceiling(host.round_trip, min(self.limit or CEILING, CEILING))
        if ceiling is not None:
            write_json(file, ceiling)

    def _scored(self, scoring: Scoring, seconds: dict, started: float, processes: Processes) -> BenchResult:
        """Score everything, and write the results."""
        rows = scoring.run(self.session)
        self.progress(0, 1, "report")
        ceiling = self.folder / "ceiling.json"
        settings = {
            "seed": self.seed,
            "limit": self.limit,
            "categories": list(self.categories),
            "published": dict(self.loaded_suite.published),
            "call": self.call,
            "judge": self.session and self.session.judge.identity,
            "judging": self.session and self.session.summary(),
            "pictures": image_sets(rows, [m.name for m in self.lineup.models], self.folder),
            "drift": measure_drift(self.drift_items, self.store, self.lineup),
            "margin": self.margin,
            **about_training(self.student, self.folder),
            "ceiling": json.loads(ceiling.read_text(encoding="utf-8")) if ceiling.is_file() else None,
            "plugins": used_plugins(name_of("suite", self.suite), self.metrics, self.lineup),
            "machine": describe_machine(str(processes.device)),
            "seconds": seconds | {"total": round(time.perf_counter() - started, 2)},
        }
        scores = summarise(rows, self.lineup, self.loaded_suite, settings)
        if self.second_session is not None:
            again = rows_of_second(scoring, rows, self.second_session)
            settings |= {"judge": self.second_session.judge.identity, "judging": self.second_session.summary()}
            second = summarise(again, self.lineup, self.loaded_suite, settings)
            scores["second_judge"] = second_judge(scores, second, self.folder)
        write_json(self.folder / "scores.json", scores, text=False)  # the report dashes None
        found = BenchResult(self.folder, scores, rows, write_report(self.folder))
        add_to_card(self.student, scores, found.sheet)
        self.progress(1, 1, "report")
        return found
