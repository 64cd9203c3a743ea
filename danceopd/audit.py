"""`audit(recipe)`: before anything is trained, does a signal rank the model's own samples?

For each teacher of the recipe, held-out questions are answered several times by the student as it would start (or by
the teacher), as a merge would draw. Every signal ranks the answers of each question, and its ranks are compared with
the truth: the facts of the built-in scenes, or a judge's score of an edit; where there is neither, with signals of
other kinds. Questions that were answered stay in the output folder, and the same call again goes on after them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from danceopd.assembly import initial_student, open_base, recorded_start, teacher_weights
from danceopd.bench.judges.registry import load_judge
from danceopd.bench.judges.session import JudgeSession
from danceopd.bench.options import JudgeOptions
from danceopd.bench.suites import viescore
from danceopd.bench.suites.protocol import Item
from danceopd.common.files import (
    disk_errors,
    json_line,
    json_safe,
    lock_file,
    read_lines,
    write_atomic,
    write_json,
)
from danceopd.common.rng import stream
from danceopd.common.system import command_line, describe_machine, resolve_device
from danceopd.data.dataset import CachedConditions
from danceopd.data.encode import Encoder, free_encoders, park_components
from danceopd.data.images import edited_picture, flattened
from danceopd.data.null_prompt import contrast_null, null_condition
from danceopd.drawing import draw_sources
from danceopd.engine.teachers import RoutedTeacher, TeacherWeights, check_teachers
from danceopd.engine.trainer import STUDENT
from danceopd.errors import UserError
from danceopd.labelfree.audit.sheet import Shown, sheet, small, strip
from danceopd.labelfree.audit.signals import LEVELS, signals_of
from danceopd.labelfree.audit.summary import RESULT, audit_folder, summary
from danceopd.labelfree.audit.table import markdown
from danceopd.labelfree.rewards import Group
from danceopd.models.base import base_fingerprint, base_folder
from danceopd.models.fields import AdapterField, BaseField, MergedField, VelocityField, acting
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.generation import GenerationPipeline, euler
from danceopd.planning.cards import card_here
from danceopd.planning.checks import check_output
from danceopd.planning.plugins import check_plugins
from danceopd.planning.settings import prepare
from danceopd.plugins import name_of
from danceopd.recipe.nft import NFT
from danceopd.recipe.recipe import Recipe
from danceopd.run.heldout import FIRST_SEED, Row, by_layout, encode_rows, held_out_rows
from danceopd.worlds.scenes.grammar import IMAGE
from danceopd.worlds.scenes.prompts import Prompt
from danceopd.worlds.scenes.read import read_many
from danceopd.worlds.scenes.score import score_edit, score_prompt

FORMAT = "danceopd-audit/1"
QUESTIONS, PICTURES = "questions.jsonl", "pictures"
EXACT = "the facts of the built-in scenes"
DRAWS = ("student", "teacher")
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """What is asked: `questions` of each teacher, `samples` of each, drawn by the student's start or by the teacher.

    `steps` of a rollout, by default the merge's; `levels`: noise levels at which the likelihood is tried alone;
    `judge` scores edits whose truth is not known.
    """

    questions: int = 64
    samples: int = 8
    draws: str = "student"
    steps: int | None = None
    levels: Sequence[float] = LEVELS
    judge: JudgeOptions = field(default_factory=JudgeOptions)

    def check(self) -> None:
        """UserError for what cannot be asked."""
        least_of = {"questions": 2, "samples": 2, "steps": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; give {least} or more")
        if self.draws not in DRAWS:
            raise UserError(f"--draws is {self.draws!r}; give student (as it would start) or teacher")
        wrong = [level for level in self.levels if not 0 < level < 1]
        if wrong or len(set(self.levels)) < len(self.levels):
            raise UserError(f"--levels has {wrong[0]:g}; give noise levels between 0 and 1" if wrong else
                            "--levels names a noise level twice; name each once")  # fmt: skip


def audit(
    recipe: Recipe, options: Options | None = None, output: Path | None = None,
    report: Report = lambda done, total, note: None,
) -> dict[str, Any]:  # fmt: skip
    """Audit the signals on the recipe's own samples; returns the contents of `audit.json` in the output folder.

    UserError for all that a merge would refuse, before a model is loaded. Beside `audit.json` are written `audit.md`,
    a sheet of pictures of each teacher, and what was drawn.
    """
    began, options = time.monotonic(), options or Options()
    options.check()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("an audit runs in one process; start it without torchrun")
    folder = output or audit_folder(recipe.output)
    rewards = recipe.nft
    check_plugins(recipe)
    base = base_folder(recipe.base)
    if recipe.base_dtype is not None or recipe.offload != "none":
        raise UserError(
            "an audit has the whole base on the device, as it is stored; leave base_dtype and offload out of a copy of "
            "the recipe, and audit that"
        )
    check_output(folder)
    session = _session(options.judge, folder)
    teachers = check_teachers(recipe.teachers, base, fast=recipe.fast)
    recipe = recipe.model_copy(update={"output": folder})  # whose cache it uses
    prepared = prepare(recipe, base, teachers, card_here(resolve_device(recipe.device)), ended=False)
    assert prepared.run is not None
    recipe, datasets = prepared.recipe, prepared.run.datasets
    recipe = recipe.replaced({"rollout.steps": options.steps}) if options.steps else recipe
    identity = _identity(recipe, teachers, base, options, rewards)
    with _opened(folder, identity):
        known = _known(folder)
        questions = {
            t.name: held_out_rows(t, recipe.data_source(t), datasets[t.name], options.questions, recipe.seed)
            for t in recipe.teachers
        }
        total = sum(map(len, questions.values()))
        if len(known) == total and (folder / RESULT).is_file():
            return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
        device = resolve_device(recipe.device)
        loaded = [teacher_weights(recipe, one, base, device) for one in teachers]
        drawing = partial(_drawing, report)
        draw_sources(recipe, base, loaded, datasets, device, drawing, prepared.run.saved, held_out=options.questions)
        model = _Model(recipe, base, loaded, questions, options, rewards)
        asker = _Asker(model, options, recipe.seed, session, folder)
        report(len(known), total, "loading")
        for line in asker.ask(known):
            known[line["teacher"], line["question"]] = line
            report(len(known), total, f"questions of {line['teacher']}")
        lines = {t.name: [known[t.name, i] for i in range(len(questions[t.name]))] for t in recipe.teachers}
        facts = {
            "format": FORMAT, "command": command_line(), "machine": describe_machine(str(model.device)),
            "seconds": round(time.monotonic() - began, 1), "identity": identity, "samples": options.samples,
            "by": "the student's start" if options.draws == "student" else "the teacher", "steps": recipe.rollout.steps,
            "teachers": {
                t.name: summary(t.capability, lines[t.name], model.signals[t.name], rewards) for t in recipe.teachers
            },
        }  # fmt: skip
        write_json(folder / RESULT, facts, text=False)
        with disk_errors(folder):
            write_atomic(folder / "audit.md", markdown(facts).encode())
            for t in recipe.teachers:
                shown = [
                    Shown(line, picture_of(row), Image.open(folder / PICTURES / f"{t.name}-{i}.png"))
                    for i, (row, line) in enumerate(zip(questions[t.name], lines[t.name], strict=True))
                ]
                sheet(shown).save(folder / f"audit-{t.name}.png")
    return facts


def _drawing(report: Report, done: int, total: int, note: str) -> None:
    report(done, total, f"drawing sources of edits {note}".strip())


def _identity(
    recipe: Recipe, teachers: Sequence[TeacherWeights], base: Path, options: Options, rewards: NFT
) -> dict[str, Any]:
    """What the figures depend on; a folder holds one of them."""
    found = {
        "base": base_fingerprint(base),
        "teachers": {one.teacher.name: [one.sha256, one.teacher.scale, one.teacher.guidance] for one in teachers},
        "student": recipe.student.model_dump(mode="json") if options.draws == "student" else None,
        "data": {t.name: recipe.data_source(t) for t in recipe.teachers},
        "rewards": {name: part.model_dump(mode="json") for name, part in rewards.rewards.items()},
        "call": recipe.call, "steps": recipe.rollout.steps, "seed": recipe.seed,
        **{key: value for key, value in asdict(options).items() if key not in ("judge", "steps")},
        "judge": options.judge.judge and name_of("judge", options.judge.judge),
    }  # fmt: skip
    return json.loads(json.dumps(json_safe(found), default=str))


def _opened(folder: Path, identity: Mapping[str, Any]) -> Any:
    """The locked output folder, which holds this audit or nothing; a context."""
    first = next(read_lines(folder / QUESTIONS), None)
    held = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if held and first is None and any(name not in ("cache", PICTURES, QUESTIONS, "judge.jsonl") for name in held):
        raise UserError(f"output folder {folder} holds other files ({held[0]}); choose another --output")
    if first is not None and first.get("identity") != identity:
        odd = [key for key in identity if (first.get("identity") or {}).get(key) != identity[key]]
        what = ", ".join(odd) or "other options"
        raise UserError(f"{folder} holds an audit with other {what}; choose another --output, or delete that folder")
    with disk_errors(folder):
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / ".lock")
        lines = [{"identity": identity}] if first is None else [*read_lines(folder / QUESTIONS)]
        write_atomic(folder / QUESTIONS, "".join(map(json_line, lines)).encode())  # without a line that was cut off
    return nullcontext() if lock is None else closing(lock)


def _known(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The questions that were answered before, by teacher and number."""
    lines = [line for line in read_lines(folder / QUESTIONS) if "question" in line]
    return {(line["teacher"], line["question"]): line for line in lines}


def _session(judge: JudgeOptions, folder: Path) -> JudgeSession | None:
    """A judge's session, asked for nothing yet; None without a judge."""
    if judge.judge in (None, "none"):
        return None
    made = load_judge(judge.judge, **judge.arguments)
    made.check()
    return JudgeSession(made, folder / "judge.jsonl", judge.repeats, judge.max_cost)


class _Model:
    """The loaded base with the teachers, the student as it would start, the questions' conditions, and the signals."""

    def __init__(
        self, recipe: Recipe, base: Path, weights: Sequence[TeacherWeights], questions: Mapping[str, Sequence[Row]],
        options: Options, rewards: NFT,
    ) -> None:  # fmt: skip
        self.recipe, self.questions, self.device = recipe, questions, resolve_device(recipe.device)
        init = initial_student(recipe, list(weights), base) if options.draws == "student" else None
        fingerprint = base_fingerprint(base)
        opened = open_base(recipe, base, None, self.device, [teacher.capability for teacher in recipe.teachers])
        pipelines, backbone = opened.pipelines, opened.backbone
        self.encoder = Encoder(base, opened.family, pipelines, recipe.editing_base)
        self.datasets: dict[str, CachedConditions] = {}
        self.teachers: dict[str, RoutedTeacher] = {}
        nulls: dict[str, Condition | None] = {}
        for one in weights:
            teacher, pipeline = one.teacher, pipelines[one.teacher.capability]
            if teacher.guidance is not None:
                null = null_condition(pipeline, teacher, fingerprint, recipe.output / "cache")
            else:
                null = contrast_null(pipeline, teacher)
            nulls[teacher.name] = null = None if null is None else null.to(self.device)
            routed = one.attach(backbone, null, bool(recipe.rollout.merged) and not recipe.compile)
            rows = questions[teacher.name]
            dataset = encode_rows(teacher.capability, self.encoder, rows, recipe.rollout.steps)
            self.datasets[teacher.name] = dataset
            self.teachers[teacher.name] = RoutedTeacher(teacher.name, routed, dataset, null)
        free_encoders(self.encoder, opened.pipe)
        park_components(self.encoder)
        opened.transformer.to(self.device)
        self.student: VelocityField | None = None
        if init is not None:
            every_row = {name: range(len(found)) for name, found in questions.items()}
            init = recorded_start(recipe, init, weights, [*self.teachers.values()], every_row, backbone)
            backbone.new_student(STUDENT, recipe.student.rank, recipe.seed, init.adapter)
            self.student = (MergedField if recipe.rollout.merged else AdapterField)(backbone, STUDENT)
        self.rows = max(recipe.rows_at_once, options.samples)
        bare, every = BaseField(backbone), [*self.teachers.values()]
        self.signals = {
            t.name: signals_of(
                rewards, self.teachers[t.name], t.capability, every, bare, nulls[t.name], options.levels, self.rows
            )
            for t in recipe.teachers
        }

    def draw(
        self, name: str, members: Sequence[int], samples: int
    ) -> tuple[torch.Tensor, Condition, GenerationPipeline]:
        """Clean latents of some questions, each question's samples side by side, and the questions' conditions."""
        dataset, teacher = self.datasets[name], next(t for t in self.recipe.teachers if t.name == name)
        pipeline = self.encoder.sized(teacher.capability, dataset.size(members[0]))
        noise = pipeline.noise([FIRST_SEED + i * samples + s for i in members for s in range(samples)])
        questions = dataset.rows(list(members)).to(self.device)
        condition = questions.rows([place for place in range(len(members)) for _ in range(samples)])
        drawn_by = self.student or self.teachers[name].field
        with torch.no_grad(), acting(drawn_by):
            *_, last = euler(drawn_by, noise.to(self.device), dataset.sigmas(members[0]), condition)
        return last.x, questions, pipeline


@dataclass
class _Asker:
    """Draws, ranks and judges the questions that are not answered yet, a few at a time."""

    model: _Model
    options: Options
    seed: int
    session: JudgeSession | None
    folder: Path

    def ask(self, known: Mapping[tuple[str, int], Any]) -> Iterator[dict[str, Any]]:
        """A line for each question, after it was written."""
        at_once = max(1, self.model.rows // self.options.samples)
        for name, rows in self.model.questions.items():
            left = [i for i in range(len(rows)) if (name, i) not in known]
            for members in by_layout(self.model.datasets[name], left):
                for first in range(0, len(members), at_once):
                    yield from self._some(name, members[first : first + at_once])

    def _some(self, name: str, members: list[int]) -> Iterator[dict[str, Any]]:
        samples, rows = self.options.samples, [self.model.questions[name][i] for i in members]
        began = time.monotonic()
        clean, conditions, pipeline = self.model.draw(name, members, samples)
        groups = [
            Group(clean[n * samples : (n + 1) * samples], conditions.rows([n]),
                  int(stream(self.seed, i, f"audit/{name}").integers(2**62)))
            for n, i in enumerate(members)
        ]  # fmt: skip
        if clean.is_cuda:
            torch.cuda.synchronize(clean.device)  # or the first signal is charged with the drawing
        seconds = {"drawing": (time.monotonic() - began) / len(clean)}
        values = {}
        for signal, one in self.model.signals[name].items():
            began = time.monotonic()
            values[signal] = one.reward(groups).double().cpu().tolist()
            seconds[signal] = (time.monotonic() - began) / len(clean)
        pictures = [flattened(one) for one in pipeline.images(clean)]
        for n, i in enumerate(members):
            own = pictures[n * samples : (n + 1) * samples]
            truth, judged_by = self._truth(name, i, rows[n], own)
            line = {
                "teacher": name, "question": i, "prompt": rows[n].prompt, "truth": truth, "judge": judged_by,
                "signals": {signal: found[n] for signal, found in values.items()}, "seconds": seconds,
            }  # fmt: skip
            line = json_safe(line, text=False)
            with disk_errors(self.folder):
                strip(own).save(self.folder / PICTURES / f"{name}-{i}.png")
                with open(self.folder / QUESTIONS, "a", encoding="utf-8") as file:
                    file.write(json_line(line))
            yield line

    def _truth(
        self, name: str, number: int, row: Row, pictures: Sequence[Image.Image]
    ) -> tuple[list[float] | None, str | None]:
        """What each picture is worth, from 0 to 1, and who says so; None where nobody knows."""
        if row.task is not None and pictures[0].size == (IMAGE, IMAGE):
            found = []
            for reading in read_many(pictures):
                if isinstance(row.task, Prompt):
                    found.append(float(score_prompt(row.task, reading).correct))
                else:
                    found.append(float(score_edit(row.task, reading).exact))
            return found, EXACT
        if self.session is None or row.source is None:
            return None, None
        prompts, source = viescore.judge_prompts(None), edited_picture(row.source)
        asked = []
        for place, picture in enumerate(pictures):
            item = Item(f"{number}-{place}", "editing", "audit", "audit", row.prompt, source=source)
            about = {"instruction": row.prompt}
            asked += [replace(q, key=f"{name}/{q.key}") for q in viescore.questions(item, picture, prompts, about)]
        answers = self.session.answers(asked)
        scores = []
        for first in range(0, len(asked), 2):
            both = {q.aspect: answers[q.key][0] for q in asked[first : first + 2]}
            scores.append(viescore.verdict(both).value)
        whole = None not in scores  # a question of which one picture has no score ranks nothing
        return [score / 10 for score in scores if score is not None] if whole else None, self.session.judge.name


def picture_of(row: Row) -> Image.Image | None:
    """The small source of an edit."""
    return None if row.source is None else small(edited_picture(row.source))
