"""Panels: held-out rows that are asked the same at every check, and what the student's answers to them show.

A panel belongs to one teacher. The student draws every prompt from several fixed noises; in the middle of its walk the
frozen teacher, and a wrong prompt, are asked at the student's own states. From that follow its beliefs (how sure one
may be of each picture: higher is surer), how much it heeds its prompt, and how much pictures of one prompt differ; a
judge scores the pictures. A belief is a frozen field's, for a student that is asked itself agrees with itself however
wrong it is. Everything is fixed but the student, and nothing draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danceopd import evidence
from danceopd.anchors import Judge
from danceopd.consensus import agreement
from danceopd.fields import VelocityField
from danceopd.pipelines.record import Condition
from danceopd.watch_figures import Look, spread

AGREEMENT = "agreement with the teacher"
PROGRESS = "the evidence gate"
CONSENSUS = "the consensus gate"

Framed = Callable[[VelocityField, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
"""A field's answers to the framings of B rows at `x (B, …)`, `sigma (B,)`: (N, B, …), and which are there (N, B)."""


@dataclass(frozen=True)
class Held:
    """Prompts of one layout and schedule, P of them, each drawn from S noises that lie side by side.

    `condition` and `contrast` (another prompt of them, all else the same) have P rows, `noise` is (P * S, …), `judge`
    scores clean latents of its shape. Conditions and noise stay on the CPU.
    """

    condition: Condition
    contrast: Condition
    noise: Tensor
    sigmas: Tensor
    judge: Judge
    framed: Framed | None = None

    @property
    def seeds(self) -> int:
        return len(self.noise) // len(self.condition)


@dataclass
class Panel:
    """A teacher's held-out rows. `chunk` are rows at a time."""

    name: str
    teacher: VelocityField
    held: Sequence[Held]
    device: torch.device
    chunk: int = 32
    progress: bool = False
    usual: float = field(default=0.0, init=False)

    @property
    def prompts(self) -> int:
        """How many there are."""
        return sum(len(held.condition) for held in self.held)

    def begin(self) -> None:
        """See the teacher draw the same rows: how much its pictures differ is usual, and some judges compare with them.

        A blend of teachers is vague at first, and an edit that succeeds looks the same from every noise: becoming as
        definite as the teacher is no collapse.
        """
        drawn = [self._draw(held, self.teacher) for held in self.held]
        for held, clean in zip(self.held, drawn):
            held.judge.remember(clean)
        self.usual = self._spread(drawn)

    @torch.no_grad()
    def look(self, student: VelocityField) -> Look:
        """What the student shows now."""
        score, clean, beliefs = [], [], dict[str, list[Tensor]]()
        heeded = torch.zeros(2, dtype=torch.float64)
        for held in self.held:
            parts = []
            for rows, condition, contrast, noise in self._chunks(held):
                x, sigma, middle, velocity = self._walk(held, student, condition, noise)
                parts.append(x)
                answer, away = self.teacher(middle, sigma, condition), self.teacher(middle, sigma, contrast)
                blind = student(middle, sigma, contrast)
                found = {AGREEMENT: -(velocity - answer).square().flatten(1).mean(1)}
                if self.progress:
                    found[PROGRESS] = evidence.scores(evidence.progress(velocity, away, answer - away))
                if held.framed is not None:
                    framed, there = held.framed(self.teacher, middle, sigma, rows)
                    found[CONSENSUS] = agreement(framed, there.to(framed.device), away)
                for name, belief in found.items():
                    beliefs.setdefault(name, []).append(belief.double().cpu().unflatten(0, (-1, held.seeds)))
                pair = [(velocity - blind).square().sum(), (answer - away).square().sum()]
                heeded += torch.stack(pair).double().cpu()
            clean.append(torch.cat(parts))
            score.append(held.judge(clean[-1]).double().cpu().unflatten(0, (-1, held.seeds)))
        return Look(
            torch.cat(score).numpy(),
            {name: torch.cat(values).numpy() for name, values in beliefs.items()},
            float(heeded[0] / heeded[1]),
            self._spread(clean),
        )

    def _chunks(self, held: Held) -> Iterator[tuple[list[int], Condition, Condition, Tensor]]:
        """Some prompts at a time, each with all its noises: the prompts of the rows, conditions, contrasts, noise."""
        size = max(1, self.chunk // held.seeds)
        for first in range(0, len(held.condition), size):
            prompts = range(first, min(first + size, len(held.condition)))
            rows = [prompt for prompt in prompts for _ in range(held.seeds)]
            noise = held.noise[first * held.seeds : (prompts[-1] + 1) * held.seeds].to(self.device)
            yield rows, held.condition.rows(rows).to(self.device), held.contrast.rows(rows).to(self.device), noise

    @staticmethod
    def _walk(
        held: Held, field: VelocityField, condition: Condition, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Euler's steps to the clean end: clean latents, and noise level, state and velocity of the middle step."""
        grid = held.sigmas.to(noise.device, torch.float32)
        x, middle = noise.float(), (len(grid) - 1) // 2
        for step in range(len(grid) - 1):
            sigma = grid[step].expand(len(x))
            velocity = field(x, sigma, condition)
            if step == middle:
                kept = sigma, x, velocity
            x = x + (grid[step + 1] - grid[step]) * velocity
        return x, *kept

    @torch.no_grad()
    def _draw(self, held: Held, field: VelocityField) -> Tensor:
        parts = [self._walk(held, field, condition, noise)[0] for _, condition, _, noise in self._chunks(held)]
        return torch.cat(parts)

    def _spread(self, clean: Sequence[Tensor]) -> float:
        parts = zip(self.held, clean, strict=True)
        return sum(len(held.condition) * spread(x, held.seeds) for held, x in parts) / self.prompts
