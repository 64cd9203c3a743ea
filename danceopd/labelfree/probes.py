"""Probes: held-out prompts that every check of the monitor uses, and what the student's pictures of them show.

A `ProbeSet` belongs to one teacher. The student draws every prompt from several fixed noises; in the middle of its
rollout the frozen teacher is queried at the student's own states, with the prompt and with a wrong one. From that
follow confidences (how sure a frozen field is of each picture: higher is surer), how closely the student follows its
prompt, and how much pictures of one prompt differ; a judge scores the pictures. A confidence is never the student's
own: a student agrees with itself however wrong it is. All is fixed but the student, and nothing draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor

from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder
from danceopd.data.images import edited_picture, flattened
from danceopd.labelfree.gates import evidence
from danceopd.labelfree.gates.consensus import agreement
from danceopd.labelfree.gates.variants import other_prompts
from danceopd.labelfree.rewards import Group, Reward, rewards_for
from danceopd.labelfree.scorers import Denoiser, Exact, Scorer, Similarity, SimilarityScorer
from danceopd.labelfree.statistics import Measurement, spread
from danceopd.models.fields import VelocityField, acting
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.generation import euler
from danceopd.pipelines.registry import with_prompt_of
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe
from danceopd.run.heldout import FIRST_SEED, Row, _log, by_layout, encode_rows, held_out_rows
from danceopd.worlds.scenes.grammar import IMAGE
from danceopd.worlds.scenes.paraphrase import paraphrases

AGREEMENT = "agreement with the teacher"
PROGRESS = "the evidence gate"
CONSENSUS = "the consensus gate"

Paraphrased = Callable[[VelocityField, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
"""A field's velocities under N wordings at `x (B, …)`, `sigma (B,)`: (N, B, …), and which are there (N, B)."""


@dataclass(frozen=True)
class ProbeBatch:
    """Prompts of one layout and schedule, P of them, each drawn from S noises that lie side by side.

    `condition` and `contrast` (another prompt of them, all else the same) have P rows, `noise` is (P * S, …), `scorer`
    scores clean latents of its shape. Conditions and noise stay on the CPU.
    """

    condition: Condition
    contrast: Condition
    noise: Tensor
    sigmas: Tensor
    scorer: Scorer
    paraphrased: Paraphrased | None = None

    @property
    def seeds(self) -> int:
        """Pictures of each prompt."""
        return len(self.noise) // len(self.condition)


@dataclass
class ProbeSet:
    """A teacher's held-out rows. `chunk` are rows at a time."""

    name: str
    teacher: VelocityField
    batches: Sequence[ProbeBatch]
    device: torch.device
    chunk: int = 32
    progress: bool = False
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    usual_spread: float = field(default=0.0, init=False)

    @property
    def prompts(self) -> int:
        """How many there are."""
        return sum(len(batch.condition) for batch in self.batches)

    def calibrate(self) -> None:
        """Let the teacher draw the same rows: its spread is the usual one, and some scorers compare with its pictures.

        A blend of teachers is vague at first, and an edit that succeeds looks the same from every noise: becoming as
        definite as the teacher is no collapse.
        """
        drawn = [self._draw(batch, self.teacher) for batch in self.batches]
        for batch, clean in zip(self.batches, drawn):
            batch.scorer.calibrate(clean)
        self.usual_spread = self._spread(drawn)

    @torch.no_grad()
    def measure(self, student: VelocityField) -> Measurement:
        """What the student shows now."""
        score, clean, confidences, rewarded = [], [], dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        followed = torch.zeros(2, dtype=torch.float64)
        for batch in self.batches:
            parts = []
            for rows, condition, contrast, noise in self._chunks(batch):
                x, sigma, middle, velocity = _rollout(batch, student, condition, noise)
                parts.append(x)
                teacher, teacher_wrong = (self.teacher(middle, sigma, c) for c in (condition, contrast))
                student_wrong = student(middle, sigma, contrast)
                found = {AGREEMENT: -(velocity - teacher).square().flatten(1).mean(1)}
                if self.progress:
                    rho = evidence.progress(velocity, teacher_wrong, teacher - teacher_wrong)
                    found[PROGRESS] = evidence.scores(rho)
                if batch.paraphrased is not None:
                    wordings, there = batch.paraphrased(self.teacher, middle, sigma, rows)
                    found[CONSENSUS] = agreement(wordings, there.to(wordings.device), teacher_wrong)
                for name, confidence in found.items():
                    confidences.setdefault(name, []).append(confidence.double().cpu().unflatten(0, (-1, batch.seeds)))
                pair = [(velocity - student_wrong).square().sum(), (teacher - teacher_wrong).square().sum()]
                followed += torch.stack(pair).double().cpu()
            clean.append(torch.cat(parts))
            for name, values in self._rewarded(batch, clean[-1]).items():
                rewarded.setdefault(name, []).append(values.double().cpu())
            score.append(batch.scorer(clean[-1]).double().cpu().unflatten(0, (-1, batch.seeds)))
        whole = {name: values for name, values in rewarded.items() if len(values) == len(self.batches)}
        return Measurement(
            torch.cat(score).numpy(),
            {name: torch.cat(values).numpy() for name, values in (confidences | whole).items()},
            float(followed[0] / followed[1]),
            self._spread(clean),
            next((batch.scorer.open_shift for batch in self.batches if isinstance(batch.scorer, Exact)), None),
        )

    def _rewarded(self, batch: ProbeBatch, clean: Tensor) -> dict[str, Tensor]:
        """Each reward of the pictures (prompts, seeds), where it says something of every prompt."""
        conditions = batch.condition.to(self.device)
        groups = [
            Group(one, conditions.rows([prompt]), 3 * FIRST_SEED + prompt)
            for prompt, one in enumerate(clean.unflatten(0, (-1, batch.seeds)))
        ]
        found = {f"the reward {name}": reward(groups) for name, reward in self.rewards.items()}
        return {name: values for name, values in found.items() if not bool(values.isnan().any())}

    def _chunks(self, batch: ProbeBatch) -> Iterator[tuple[list[int], Condition, Condition, Tensor]]:
        """Some prompts at a time, each with all its noises: the prompts of the rows, conditions, contrasts, noise."""
        size = max(1, self.chunk // batch.seeds)
        for first in range(0, len(batch.condition), size):
            prompts = range(first, min(first + size, len(batch.condition)))
            rows = [prompt for prompt in prompts for _ in range(batch.seeds)]
            noise = batch.noise[first * batch.seeds : (prompts[-1] + 1) * batch.seeds].to(self.device)
            yield rows, batch.condition.rows(rows).to(self.device), batch.contrast.rows(rows).to(self.device), noise

    @torch.no_grad()
    def _draw(self, batch: ProbeBatch, field: VelocityField) -> Tensor:
        parts = [_rollout(batch, field, condition, noise)[0] for _, condition, _, noise in self._chunks(batch)]
        return torch.cat(parts)

    def _spread(self, clean: Sequence[Tensor]) -> float:
        parts = zip(self.batches, clean, strict=True)
        return sum(len(batch.condition) * spread(x, batch.seeds) for batch, x in parts) / self.prompts


def _rollout(
    batch: ProbeBatch, field: VelocityField, condition: Condition, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Euler's steps to the clean end: clean latents, and noise level, state and velocity of the middle step."""
    half = (len(batch.sigmas) - 1) // 2
    with acting(field):
        for state in euler(field, noise, batch.sigmas, condition):
            if state.step == half:
                middle = state
    sigma = batch.sigmas.to(noise.device, torch.float32)[half].expand(len(noise))
    return state.x, sigma, middle.x, middle.velocity


@dataclass(frozen=True)
class FrozenFields:
    """The teachers' fields by name, and the bare base's."""

    teachers: Mapping[str, VelocityField]
    base: VelocityField


def probe_sets(
    recipe: Recipe,
    encoder: Encoder,
    datasets: Mapping[str, TeacherData],
    fields: FrozenFields,
    device: torch.device,
) -> tuple[list[ProbeSet], str]:
    """The probes of each teacher that has held-out rows, and who judges their pictures, in words."""
    options, found, judges = recipe.monitor, [], dict[str, None]()
    model = None if options.judge is None else Similarity(options.judge, device)
    for teacher in recipe.teachers:
        data = datasets[teacher.name]
        rows = held_out_rows(
            teacher, recipe.data_source(teacher), data, max(2, options.prompts // len(recipe.teachers)), recipe.seed
        )
        maker = _Maker(recipe, teacher, encoder, data, fields, device, model)
        batches = [one for members in maker.layouts(rows) if (one := maker.batch(members)) is not None]
        if not batches:
            _log.warning("the monitor has no prompts for %s: no two of its held-out rows have one size", teacher.name)
            continue
        judges |= dict.fromkeys(maker.judges)
        probes = ProbeSet(teacher.name, fields.teachers[teacher.name], batches, device, maker.chunk)
        probes.progress = recipe.gates.evidence is not None
        if recipe.objective == "nft":
            asked = {**fields.teachers, "base": fields.base}
            probes.rewards = rewards_for(recipe.nft, teacher.name, asked, maker.chunk)
        found.append(probes)
    return found, " and ".join(judges)


class _Maker:
    """Makes one teacher's rows into probe batches; `judges` are their scorers, in words."""

    def __init__(
        self, recipe: Recipe, teacher: Teacher, encoder: Encoder, data: TeacherData, fields: FrozenFields,
        device: torch.device, model: Similarity | None,
    ) -> None:  # fmt: skip
        self.recipe, self.teacher, self.encoder, self.data = recipe, teacher, encoder, data
        self.fields, self.device, self.model = fields, device, model
        self.chunk = max(recipe.rows_at_once, recipe.monitor.seeds)
        self.judges: list[str] = []

    def layouts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows, encoded, by layout and schedule."""
        self.rows = rows
        self.dataset = encode_rows(self.teacher.capability, self.encoder, rows, self.recipe.rollout.steps)
        return by_layout(self.dataset, range(len(rows)))

    def batch(self, members: list[int]) -> ProbeBatch | None:
        """Rows of one layout; None for a single one, which has no other to be contrasted with."""
        if len(members) < 2:
            return None
        seeds, rows = self.recipe.monitor.seeds, [self.rows[i] for i in members]
        pipeline = self.encoder.sized(self.teacher.capability, self.dataset.size(members[0]))
        noise = pipeline.noise([FIRST_SEED + i * seeds + s for i in members for s in range(seeds)])
        condition, sigmas = self.dataset.rows(members), self.dataset.sigmas(members[0])
        contrast = with_prompt_of(condition, self.dataset.rows(members[1:] + members[:1]))
        tasks = [row.task for row in rows if row.task is not None]
        scorer: Scorer

        def draw(x: Tensor) -> list[Image]:
            return [flattened(one) for one in pipeline.images(x)]

        if self.model is not None:
            sources = [edited_picture(row.source) for row in rows if row.source is not None]
            scorer = SimilarityScorer(self.model, draw, [row.prompt for row in rows], sources)
            judge = self.model.sentence
        elif len(tasks) == len(rows) and (pipeline.height, pipeline.width) == (IMAGE, IMAGE):
            scorer = Exact(draw, tasks)
            judge = scorer.sentence
        else:
            field, whose = self._other_field()
            level = float(sigmas[(len(sigmas) - 1) // 2])
            again = pipeline.noise([2 * FIRST_SEED + i * seeds + s for i in members for s in range(seeds)])
            scorer = Denoiser(field, condition, contrast, again, level, self.chunk)
            judge = f"{whose} (a weak judge; give monitor.judge a similarity model)"
        self.judges.append(judge)
        return ProbeBatch(condition, contrast, noise, sigmas, scorer, self._paraphrased(members))

    def _other_field(self) -> tuple[VelocityField, str]:
        """A frozen field that teaches none of these rows, and whose it is."""
        mine = {t.name for t in self.recipe.teachers if t.capability == self.teacher.capability}
        if all(t.adapter != "base" for t in self.recipe.teachers if t.name in mine):
            return self.fields.base, "how the base denoises the pictures"
        other = next((t.name for t in self.recipe.teachers if t.name not in mine), None)
        if other is None:
            return self.fields.base, "how the base, a teacher itself, denoises the pictures"
        return self.fields.teachers[other], f"how teacher {other} denoises the pictures"

    def _paraphrased(self, members: list[int]) -> Paraphrased | None:
        """Velocities under the wordings that a consensus gate would use."""
        options = self.recipe.gates.consensus
        if options is None:
            return None
        wordings = [[self.rows[i].prompt, *self._paraphrases(self.rows[i])][: options.framings] for i in members]
        conditions: list[Condition] = []
        for place in range(max(map(len, wordings))):
            prompts = [some[min(place, len(some) - 1)] for some in wordings]
            dataset = encode_rows(
                self.teacher.capability, self.encoder, [self.rows[i] for i in members],
                self.recipe.rollout.steps, prompts,
            )  # fmt: skip
            if any(dataset.layout(i) != self.dataset.layout(members[0]) for i in range(len(members))):
                return None
            conditions.append(dataset.rows(list(range(len(members)))))
        counts = torch.tensor([len(some) for some in wordings])

        def velocities(field: VelocityField, x: Tensor, sigma: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            found = torch.stack([field(x, sigma, one.rows(rows).to(self.device)) for one in conditions])
            return found, torch.arange(len(conditions))[:, None] < counts[rows]

        return velocities

    def _paraphrases(self, row: Row) -> Sequence[str]:
        return paraphrases(row.prompt) if row.index is None else other_prompts(self.data.data, row.index)
