"""The gates as one hook of the trainer: which frozen velocities a batch is queried for besides, and what they make of
it.

`GateHook` is called once an update and once a batch. `BatchGates.rollout` takes the rows to their queries, some to
critical steps; `BatchGates.query` asks everything frozen at a state, before the student's velocity with a gradient;
`GateAnswers.weights` then weighs the rows by what the student predicts. The formulas are in evidence.py, consensus.py
and skills.py, their composition in weights.py. An unconditional row, or one that lacks what a gate needs, passes that
gate with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd.common.tensors import append_dims
from danceopd.data.dataset import Dataset
from danceopd.engine.batches import Batch, Draw
from danceopd.engine.callbacks import RowWeights
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.velocities import Velocities
from danceopd.errors import UserError
from danceopd.labelfree.gates import consensus, evidence, skills
from danceopd.labelfree.gates.context import NULL, PRIVILEGED, WRONG, BatchContext, StepContext
from danceopd.labelfree.gates.variants import KEEP, PARAPHRASE
from danceopd.labelfree.gates.weights import METRICS, RunningMeans, combine, summary
from danceopd.models.fields import unguided
from danceopd.recipe.labelfree import Gates


class GateHook:
    """The gates of a run: running means that rows are compared with, and the conditions that rows can be queried under.

    UserError where a gate needs the null prompt and a teacher has none.
    """

    metric_names: Sequence[str] = METRICS

    def __init__(
        self, gates: Gates, teachers: Sequence[RoutedTeacher], capabilities: Sequence[str], device: torch.device,
        *, seed: int, rollout_steps: int,
    ) -> None:  # fmt: skip
        self.gates, self.teachers, self.device = gates, list(teachers), device
        self.seed, self.rollout_steps, self.capabilities = seed, rollout_steps, list(capabilities)
        self.running = RunningMeans(len(teachers), device)
        for teacher, task in zip(teachers, self.capabilities, strict=True):
            if self.gates.needs_null(task) and teacher.null is None and KEEP not in teacher.variants:
                raise UserError(f"gates query the null prompt, and teacher {teacher.name!r} has none; leave them out")

    def begin_step(self, step: int, draw: Draw) -> None:
        self.step = StepContext(
            self.gates, self.teachers, self.capabilities, self.device, self.seed, step, self.rollout_steps, draw
        )

    def dataset(self, group: int) -> Dataset:
        return self.step.dataset(group)

    def begin_batch(self, batch: Batch, groups: Sequence[int], layout: Sequence[int]) -> BatchGates:
        return BatchGates(self.gates, self.running, self.step.of_batch(groups, layout, batch.condition))

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        return summary(means)

    def end_step(self, all_reduce: Callable[[Tensor], None]) -> None:
        self.running.fold(all_reduce)

    def state_dict(self) -> dict[str, Tensor]:
        return self.running.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.running.load_state_dict(state)


@dataclass
class BatchGates:
    """The gates of one batch; `context` says which rows are queried under which other conditions."""

    gates: Gates
    running: RunningMeans
    context: BatchContext

    def rollout(self, batch: Batch, velocities: Velocities) -> Tensor:
        """States (B, K, …) at the rows' queries; critical rows move theirs to steps that decided something.

        Only those rows roll on to the end of the candidates.
        """
        steps, sigmas, options = batch.query_step, batch.query_sigma, self.gates.skills
        critical = self.context.critical
        if options is None or not bool(critical.any()):
            return velocities.rollout(batch, steps, sigmas)
        count, grid = steps.shape[1], batch.sigmas.float()
        last = skills.candidates(len(batch.sigmas) - 1, options.until)
        ahead = torch.cat([torch.arange(last), torch.tensor([last + 1])])  # candidates, and the state after the last
        every = torch.cat([steps, torch.where(critical[:, None], ahead, steps[:, :1])], dim=1)
        to = torch.cat([sigmas, torch.where(critical[:, None], grid[ahead], sigmas[:, :1])], dim=1)
        observer = skills.Criticality(batch.sigmas, len(batch), batch.device)
        states = velocities.rollout(batch, every, to, observer)
        kappa = observer.kappa[:, :last].cpu()
        picked, sound = skills.chosen(kappa, self.context.keys, count, options.top, self.gates.group)
        moved = (critical & sound)[:, None]
        place = torch.where(moved, count + picked, torch.arange(count)).to(states.device)
        batch.set_queries(torch.where(moved, picked, steps), torch.where(moved, grid[picked], sigmas))
        return states[torch.arange(len(states), device=states.device)[:, None], place]

    def query(self, batch: Batch, velocities: Velocities, x: Tensor, sigma: Tensor, teacher: Tensor) -> GateAnswers:
        """All frozen velocities at `x (B, …)`, `sigma (B,)` besides the teachers' own, `teacher`."""
        context = self.context
        bare = [unguided(field) for field in velocities.teachers]
        found: dict[str, Tensor] = {}
        for name, other in context.others.items():
            if not name.startswith(PARAPHRASE):
                fields = bare if name == NULL else None
                found[name] = velocities.teacher_under(batch, other.rows, other.condition, x, sigma, fields)
        contrast, contrasted = teacher.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for name, velocity in found.items():
            rows = [row for row in context.others[name].rows if context.contrasts[row] == name]
            if rows:
                contrast[rows] = velocity[[context.others[name].rows.index(row) for row in rows]]
                contrasted[rows] = True
        answers = GateAnswers(self, batch, x, sigma, teacher, contrast, contrasted, target=teacher)
        self._consensus(answers, velocities, found)
        self._privileged(answers, found)
        return answers

    def _consensus(self, answers: GateAnswers, velocities: Velocities, found: Mapping[str, Tensor]) -> None:
        """How far a teacher's velocities under paraphrases agree."""
        if self.gates.consensus is None:
            return
        x, sigma, batch, others = answers.x, answers.sigma, answers.batch, self.context.others
        wordings, there = [answers.teacher], [self.context.conditional]
        for other in (other for name, other in others.items() if name.startswith(PARAPHRASE)):
            velocity = velocities.teacher_under(batch, other.rows, other.condition, x, sigma)
            wordings.append(answers.filled(other.rows, velocity))
            there.append(answers.marked(other.rows))
        answers.agreement = torch.zeros(len(x), device=x.device)
        wrong = others.get(WRONG)
        if wrong is not None:
            given = torch.stack(there) & answers.marked(wrong.rows)
            answers.agreement = consensus.agreement(
                torch.stack(wordings), given, answers.filled(wrong.rows, found[WRONG])
            )

    def _privileged(self, answers: GateAnswers, found: Mapping[str, Tensor]) -> None:
        """Shift the target towards the teacher's velocity under a privileged context, within the trust region."""
        options, others, guided = self.gates.skills, self.context.others, self.context.guided
        if options is None or not options.eta:
            return
        privileged = answers.teacher.clone()
        if PRIVILEGED in found:
            privileged[others[PRIVILEGED].rows] = found[PRIVILEGED]
        if guided:
            null = found[NULL][[others[NULL].rows.index(row) for row in guided]]
            privileged[guided] = self.context.guide(answers.teacher[guided], null, options.scale)
        rows = [*(others[PRIVILEGED].rows if PRIVILEGED in found else []), *guided]
        if rows:
            answers.shift = skills.shift(answers.teacher, privileged, options.eta, options.radius)
            answers.shifted = answers.marked(rows)
            answers.target = answers.target + answers.shift


@dataclass
class GateAnswers:
    """What frozen fields answered for B rows at one state.

    `contrast` is the velocity under the contrast where a row is `contrasted`, `agreement` how far paraphrases agree,
    `shift` what the target moved by on the rows that are `shifted`.
    """

    gates: BatchGates
    batch: Batch
    x: Tensor
    sigma: Tensor
    teacher: Tensor
    contrast: Tensor
    contrasted: Tensor
    target: Tensor
    agreement: Tensor | None = None
    shift: Tensor | None = None
    shifted: Tensor | None = None

    def marked(self, rows: list[int]) -> Tensor:
        """(B,) bool, true for `rows`."""
        found = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)
        found[rows] = True
        return found

    def filled(self, rows: list[int], velocity: Tensor) -> Tensor:
        """(B, …) with the velocities of `rows`, and zeros elsewhere."""
        found = torch.zeros_like(self.x)
        found[rows] = velocity
        return found

    def weights(self, velocity: Tensor) -> RowWeights:
        """Weights and target of each row, given the student's `velocity` (B, …) without a gradient."""
        gates, running, context = self.gates.gates, self.gates.running, self.gates.context
        conditional = context.conditional
        teachers = torch.tensor(self.batch.teacher_index, device=self.x.device)
        ones = torch.ones(len(self.x), device=self.x.device)
        parts, tokens, metrics = [ones], None, {"critical": context.critical.to(ones)}
        if gates.evidence is not None and any(contrast is not None for contrast in context.contrasts):
            options, difference = gates.evidence, self.teacher - self.contrast
            mask = evidence.edit_mask(difference, context.grid)
            rho = evidence.progress(velocity, self.contrast, difference)
            sound = self.contrasted & evidence.informative(difference, self.teacher)
            metrics["rho"] = _only(rho, sound)
            metrics["delta positive"] = _only((rho > 0.5).float(), sound)
            metrics["leak"] = _only(evidence.leak(velocity, self.teacher, mask), sound)
            score = evidence.scores(rho)
            if gates.group > 1:
                mean, deviation = evidence.of_groups(score, gates.group)
            else:
                mean, deviation = running.spread(teachers, self.sigma)
                running.note_scores(teachers, self.sigma, score, sound)
            parts.append(evidence.row_weights(score, mean, deviation, options.alpha, options.bounds, sound))
            compared = sound & (deviation >= evidence.SPREAD) & (mean >= 0)
            metrics["guarded"] = _only((~compared).float(), conditional)
            used = torch.where(append_dims(sound, mask), mask, torch.ones_like(mask))
            tokens = evidence.token_weights(used, options.tokens)
        if self.agreement is not None and gates.consensus is not None:
            metrics["consensus"] = _only(self.agreement, conditional)
            parts.append(1 + gates.consensus.bound * self.agreement)
        if self.shift is not None and self.shifted is not None:
            metrics["shift share"] = _only(skills.shift_share(self.shift, velocity, self.teacher), self.shifted)
        product, weights = combine(parts, running.usual(teachers), conditional)
        running.note_weights(teachers, product, conditional)
        wide = weights.double()
        metrics |= {"weight": weights, "weight square": wide.square(), "weight zero": (wide <= 0).double()}
        return RowWeights(weights, tokens, self.target, metrics)


def _only(values: Tensor, where: Tensor) -> Tensor:
    """NaN where a metric means nothing."""
    return torch.where(where, values, torch.full_like(values, float("nan")))
