"""The student's own samples of a batch, drawn by its average and ranked by frozen rewards, as a hook of the trainer.

At the start of each round of updates the average of the student is copied (`OLD`). The copy draws the samples of the
round, a group for each question, and stays the `v_old` of the loss until the next round. A sample is a function of
(seed, update, row) and the copy, and the copy is in every checkpoint: a run that was interrupted in the middle of a
round draws the same samples again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danceopd.common.files import disk_errors, write_json
from danceopd.common.rng import stream
from danceopd.data.dataset import Dataset
from danceopd.engine.batches import Batch, Draw, Ranked
from danceopd.engine.callbacks import Callback
from danceopd.engine.metrics import StepMetrics
from danceopd.engine.objectives import MOVED
from danceopd.engine.rollout import StudentRollout
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.labelfree.nft.contexts import Contexts, Loser
from danceopd.labelfree.nft.skills import CleanEstimates, Parting, parting
from danceopd.labelfree.rewards import Group, combined, rewards_of, standard_scores
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField, MergedField
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe

OLD = "old"
"""The adapter that draws a round's samples: the student's average at the start of the round."""
SKILLS = "skills.json"
"""In the run folder, by teacher: at which noise levels good and bad samples part, and what the teacher is given."""
_STATE = "nft.old."


class OwnSamples:
    """The trainer's hook: draws, ranks and keeps the samples of a round, which `Rounds` begins."""

    def __init__(self, recipe: Recipe, backbone: Backbone, teachers: Sequence[RoutedTeacher]) -> None:
        self.options, self.rollout, self.sampling = recipe.nft, recipe.rollout, recipe.sampling
        self.backbone, self.teachers = backbone, list(teachers)
        self.rewards = rewards_of(recipe.nft, teachers, BaseField(backbone), recipe.rows_at_once)
        self.weights = {name: reward.weight for name, reward in recipe.nft.rewards.items()}
        figures = [f"{what} {name}" for name in self.weights for what in ("reward", "std", "alike")]
        self.metric_names: Sequence[str] = [MOVED, *figures]
        names = [teacher.name for teacher in teachers]
        self.parting = Parting(names, recipe.nft.hindsight) if recipe.nft.hindsight else None
        self.contexts = Contexts(recipe.nft, self.teachers, self._scores) if recipe.nft.contexts else None
        self.seen: list[Parting | Contexts] = [one for one in (self.parting, self.contexts) if one is not None]
        self.merge_queries = bool(recipe.rollout.merged) and not recipe.compile  # where merging costs less
        self._old: Adapter | None = None
        self._samples: dict[tuple[int, str, int], tuple[Tensor, Tensor, dict[str, Tensor]]] = {}

    def begin_round(self, average: Adapter) -> None:
        """From now on `average` draws."""
        self._old = average
        self._samples.clear()
        if OLD in self.backbone.adapters:
            self.backbone.assign(OLD, average)
        else:
            self.backbone.add_adapter(OLD, average)

    @property
    def begun(self) -> bool:
        """Whether there is an average that draws."""
        return self._old is not None

    def begin_step(self, step: int, draw: Draw) -> None:
        self._draw = draw

    def dataset(self, group: int) -> Dataset:
        return self.teachers[self._draw.teacher_index[group]].dataset

    def begin_batch(self, batch: Batch, groups: Sequence[int], layout: Sequence[int]) -> None:
        """Give the batch its own samples, those of before where this update has the questions of an earlier one."""
        drawn = replace(batch, step=self.sampling.drawn_at(batch.step))
        key = (drawn.step, batch.name, batch.rows[0])
        samples = [self._draw.sample_index[g] for g in groups]
        if key not in self._samples:
            observer = CleanEstimates() if self.seen and drawn.step == batch.step else None
            clean = self._clean(drawn, observer)
            self._samples[key] = (clean.cpu(), *self._ranks(drawn, clean))
            if observer is not None:  # not where an interrupted round draws again: that was noted before
                self._note(drawn, observer, clean, self._samples[key][1].cpu(), samples)
        clean, optimality, metrics = self._samples[key]
        cheaper = self.merge_queries and self.backbone.merging_is_cheaper(OLD)
        field = (MergedField if cheaper else AdapterField)(self.backbone, OLD)
        batch.ranked = Ranked(clean.to(batch.device), optimality, field, metrics=metrics)
        if self.parting is not None:
            weights = partial(self.parting.weights, batch.teacher_index)
            batch.ranked = replace(batch.ranked, weights=weights)
        if self.contexts is not None:
            batch.context = self.contexts.of_batch(batch, samples)

    def _note(
        self, batch: Batch, estimates: CleanEstimates, clean: Tensor, optimality: Tensor, samples: Sequence[int]
    ) -> None:
        """Where the samples of each question parted, and what would have saved its worst one."""
        groups, losers = self._groups(batch, clean), []
        for group, first in zip(groups, range(0, len(batch), self.options.group)):
            rows = slice(first, first + self.options.group)
            shares = parting([one[rows] for one in estimates.found], optimality[rows])
            if self.parting is not None:
                self.parting.note(batch.teacher_index[first], batch.sigmas[:-1], shares)
            if bool(shares.isfinite().all()):
                row, step = first + int(optimality[rows].argmin()), int(shares.argmax())
                losers.append(Loser(row, step, estimates.states[step][row], group))
        if self.contexts is not None:
            self.contexts.try_on(batch, losers, samples)

    def _clean(self, batch: Batch, observer: CleanEstimates | None) -> Tensor:
        """The rows rolled out to their clean end."""
        ends = torch.full((len(batch), 1), len(batch.sigmas) - 1)
        field = (MergedField if self.rollout.merged else AdapterField)(self.backbone, OLD)
        return StudentRollout(field, self.rollout)(batch, ends, observer=observer)[:, 0]

    def _ranks(self, batch: Batch, clean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Optimality `r = 1/2 + clip(z / clip, -1, 1) / 2` of each row, and the rewards' figures."""
        rewards = self._rewards(self._groups(batch, clean), batch.teacher_index[:: self.options.group])
        score = combined(rewards, self.weights).to(clean.device)
        metrics = {}
        for name, values in rewards.items():
            alike = (standard_scores(values) == 0).all(1, keepdim=True).float()
            spread = values.std(1, correction=0, keepdim=True)
            alike = torch.where(spread.isfinite(), alike, spread)  # NaN where the reward says nothing
            for what, one in (("reward", values), ("std", spread), ("alike", alike)):
                metrics[f"{what} {name}"] = one.expand_as(values).flatten()
        return (0.5 + (score / self.options.clip).clamp(-1, 1) / 2).flatten(), metrics

    def _groups(self, batch: Batch, clean: Tensor) -> list[Group]:
        size = self.options.group
        return [
            Group(clean[i : i + size], batch.condition.rows([i]), self._seed(batch, batch.rows[i] // size))
            for i in range(0, len(batch), size)
        ]

    def _rewards(self, groups: Sequence[Group], teachers: Sequence[int]) -> dict[str, Tensor]:
        """Each reward (Q, S) of Q groups of S samples each, by the groups' teachers."""
        found = {}
        for name in self.weights:
            values = groups[0].clean.new_full((len(groups), len(groups[0].clean)), float("nan"))
            for m in dict.fromkeys(teachers):
                rows = [q for q, one in enumerate(teachers) if one == m]
                values[rows] = self.rewards[self.teachers[m].name][name]([groups[q] for q in rows])
            found[name] = values
        return found

    def _scores(self, groups: Sequence[Group], teachers: Sequence[int]) -> Tensor:
        return combined(self._rewards(groups, teachers), self.weights)

    def _seed(self, batch: Batch, group: int) -> int:
        return int(stream(batch.seed, batch.step, f"reward/{batch.name}/{group}").integers(2**62))

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        return {f"nft/{name}": value for name, value in means.items()}

    def end_step(self, all_reduce: Callable[[Tensor], None]) -> None:
        for one in self.seen:
            one.fold(all_reduce, self.backbone.parameters(STUDENT)[0].device)

    def facts(self) -> dict[str, Any]:
        """What `SKILLS` holds, by teacher, with its `summary` in plain words."""
        found: dict[str, Any] = {} if self.parting is None else self.parting.facts()
        for name, tried in ({} if self.contexts is None else self.contexts.facts()).items():
            found.setdefault(name, {})["contexts"] = tried
        for one in self.seen:
            for name, sentences in one.sentences().items():
                found[name].setdefault("summary", []).extend(sentences)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The average that draws, by flat names, empty before the first update; and what was seen in hindsight."""
        old = {} if self._old is None else self._old.tensors
        halves = [half for module in self.backbone.modules(STUDENT) for half in old.get(module, ())]
        seen = {key: value for one in self.seen for key, value in one.state_dict().items()}
        return {f"{_STATE}{i}": half for i, half in enumerate(halves)} | seen

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        halves = [state[f"{_STATE}{i}"] for i in range(sum(key.startswith(_STATE) for key in state))]
        if halves:
            pairs = zip(self.backbone.modules(STUDENT), halves[::2], halves[1::2], strict=True)
            self.begin_round(Adapter({module: (a, b) for module, a, b in pairs}))
        else:  # of before the first round
            self._old = None
        for one in self.seen:
            one.load_state_dict(state)


@dataclass
class Rounds(Callback):
    """Begins the rounds of `samples`, as long as they are the trainer's hook; keeps `SKILLS` in `folder`, if there is
    one."""

    samples: OwnSamples
    folder: Path | None = None

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.hook is self.samples and (trainer.step % self.samples.options.round == 0 or not self.samples.begun):
            self.samples.begin_round(trainer.ema_adapter())

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        ended = trainer.step % self.samples.options.round == 0 or trainer.step == trainer.steps
        if self.folder is not None and self.samples.seen and trainer.hook is self.samples and ended:
            with disk_errors(self.folder / SKILLS):
                write_json(self.folder / SKILLS, self.samples.facts())

    def sentences(self) -> list[str]:
        return [sentence for one in self.samples.seen for mine in one.sentences().values() for sentence in mine]
