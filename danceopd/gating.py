"""The gates of one lesson: what its rows are asked besides, and what the answers make of each row.

`walk` takes the rows to their queries, some to critical steps. `ask` puts all frozen questions at a state, before the
student answers with a gradient; `Heard.trust` then weighs the rows by what the student said. The equations are in
evidence.py, consensus.py and skills.py, the weights' composition in gates.py; docs/labelfree.md tells them together.
A row that is asked with the null prompt, or lacks what a gate asks for, passes that gate with weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd import consensus, evidence, skills
from danceopd.gates import Running, Trust, composed
from danceopd.lesson import Lesson, unguided
from danceopd.pipelines.record import Condition
from danceopd.query import step_weights
from danceopd.recipe_gates import Gates

NULL, WRONG, ELSEWHERE, TOLD = "null", "wrong", "elsewhere", "told"
"""What rows are asked as: with the null prompt, with another row's prompt, with another row's source, told more."""


@dataclass(frozen=True)
class As:
    """Some rows of a lesson under other conditions, one for each of `rows`."""

    rows: list[int]
    condition: Condition


@dataclass
class Gating:
    """What the gates need of the B rows of a lesson.

    `asked` says by name what some rows are asked as: `NULL`, `WRONG`, `ELSEWHERE`, `TOLD`, and "framing 1" and so on.
    `gated` (B,) bool are the rows with a prompt, `contrasts` what each is contrasted with, `guided` the rows that are
    told by guidance. `critical` (B,) bool rows ask at critical steps, by `keys` (B, steps); both lie on the CPU, for
    walks are planned by them. `grid` are rows and columns of tokens.
    """

    gates: Gates
    running: Running
    gated: Tensor
    asked: dict[str, As]
    contrasts: list[str | None]
    guided: list[int]
    critical: Tensor
    keys: Tensor
    guide: skills.Guide
    grid: tuple[int, int] | None = None

    def walk(self, lesson: Lesson) -> Tensor:
        """States (B, K, …) at the rows' queries; critical rows move theirs to steps that decided something.

        Only those rows walk to the end of the candidates.
        """
        stops, levels, knobs = lesson.stops, lesson.levels, self.gates.skills
        if knobs is None or not bool(self.critical.any()):
            return lesson.walk(stops, levels)
        count, grid = stops.shape[1], lesson.sigmas.float()
        last = skills.candidates(len(lesson.sigmas) - 1, knobs.until)
        ahead = torch.cat([torch.arange(last), torch.tensor([last + 1])])  # candidates, and the state after the last
        rows = self.critical[:, None]  # the others see their own query again
        every = torch.cat([stops, torch.where(rows, ahead, stops[:, :1])], dim=1)
        to = torch.cat([levels, torch.where(rows, grid[ahead], levels[:, :1])], dim=1)
        watch = skills.Criticality(lesson.sigmas, len(stops), lesson.device)
        seen = lesson.walk(every, to, watch)
        kappa = watch.kappa[:, :last].cpu()
        picked, sound = skills.chosen(kappa, self.keys, count, knobs.top, self.gates.group)
        moved = (self.critical & sound)[:, None]
        place = torch.where(moved, count + picked, torch.arange(count)).to(seen.device)
        lesson.stops = torch.where(moved, picked, stops)
        lesson.levels = torch.where(moved, grid[picked], levels)
        if lesson.recipe.query.weight != "even":
            lesson.weights = step_weights(lesson.stops, lesson.levels, lesson.sigmas)
        return seen[torch.arange(len(seen), device=seen.device)[:, None], place]

    def ask(self, lesson: Lesson, x: Tensor, sigma: Tensor, answer: Tensor) -> Heard:
        """All that frozen fields say at `x (B, …)`, `sigma (B,)` besides the teachers' `answer`."""
        plain = lesson.fields.teachers
        bare = [unguided(field) for field in plain]
        found = {}
        for name, one in self.asked.items():
            if name.startswith("framing"):
                continue
            found[name] = lesson.ask_as(one.rows, one.condition, x, sigma, bare if name == NULL else plain)
        away, contrasted = answer.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for name, velocity in found.items():
            at = [row for row in self.asked[name].rows if self.contrasts[row] == name]
            if at:
                places = [self.asked[name].rows.index(row) for row in at]
                away[at], contrasted[at] = velocity[places], True
        heard = Heard(self, lesson, x, sigma, answer, away, contrasted, answer)
        self._consensus(heard, found)
        self._shift(heard, found)
        return heard

    def _consensus(self, heard: Heard, found: dict[str, Tensor]) -> None:
        """Answers to the framings, and how far they agree."""
        if self.gates.consensus is None:
            return
        x, sigma, lesson = heard.x, heard.sigma, heard.lesson
        framed, there = [heard.answer], [self.gated]
        for one in (one for name, one in self.asked.items() if name.startswith("framing")):
            velocity = lesson.ask_as(one.rows, one.condition, x, sigma, lesson.fields.teachers)
            framed.append(heard.filled(one.rows, velocity))
            there.append(heard.marked(one.rows))
        heard.agreed = torch.zeros(len(x), device=x.device)
        wrong = self.asked.get(WRONG)
        if wrong is not None:
            given = torch.stack(there) & heard.marked(wrong.rows)
            heard.agreed = consensus.agreement(torch.stack(framed), given, heard.filled(wrong.rows, found[WRONG]))

    def _shift(self, heard: Heard, found: dict[str, Tensor]) -> None:
        """What the teacher says where it knows more than the student, within the trust region."""
        knobs = self.gates.skills
        if knobs is None or not knobs.eta:
            return
        told = heard.answer.clone()
        if TOLD in found:
            told[self.asked[TOLD].rows] = found[TOLD]
        if self.guided:
            places = [self.asked[NULL].rows.index(row) for row in self.guided]
            told[self.guided] = self.guide(heard.answer[self.guided], found[NULL][places], knobs.scale)
        rows = [*(self.asked[TOLD].rows if TOLD in found else []), *self.guided]
        if rows:
            heard.shifted = skills.shift(heard.answer, told, knobs.eta, knobs.radius)
            heard.moved = heard.marked(rows)
            heard.target = heard.target + heard.shifted


@dataclass
class Heard:
    """What frozen fields said of B rows at one state; `trust` weighs the rows when the student has answered, too.

    `away` is the answer to the contrast where a row is `contrasted`, `agreed` how far answers to other wordings agree,
    `shifted` what the target moved by on the rows that `moved`.
    """

    gating: Gating
    lesson: Lesson
    x: Tensor
    sigma: Tensor
    answer: Tensor
    away: Tensor
    contrasted: Tensor
    target: Tensor
    agreed: Tensor | None = None
    shifted: Tensor | None = None
    moved: Tensor | None = None

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

    def trust(self, velocity: Tensor) -> Trust:
        """Weights and target of each row, given the student's `velocity` (B, …) without a gradient."""
        gating, gates = self.gating, self.gating.gates
        running, gated = gating.running, gating.gated
        routes = torch.tensor(self.lesson.routes, device=self.x.device)
        ones = torch.ones(len(self.x), device=self.x.device)
        parts, tokens, figures = [ones], None, {"critical": gating.critical.to(ones)}
        if gates.evidence is not None and any(contrast is not None for contrast in gating.contrasts):
            difference = self.answer - self.away
            mask = evidence.edit_mask(difference, gating.grid)
            rho = evidence.progress(velocity, self.away, difference)
            sound = self.contrasted & evidence.informative(difference, self.answer)
            figures["rho"] = _only(rho, sound)
            figures["delta positive"] = _only((rho > 0.5).float(), sound)
            figures["leak"] = _only(evidence.leak(velocity, self.answer, mask), sound)
            knobs, score = gates.evidence, evidence.scores(rho)
            if gates.group > 1:
                mean, deviation = evidence.of_groups(score, gates.group)
            else:
                mean, deviation = running.spread(routes, self.sigma)
                running.note_scores(routes, self.sigma, score, sound)
            parts.append(evidence.row_weights(score, mean, deviation, knobs.alpha, knobs.bounds, sound))
            compared = sound & (deviation >= evidence.SPREAD) & (mean >= 0)
            figures["guarded"] = _only((~compared).float(), gated)
            told = torch.where(_like(sound, mask), mask, torch.ones_like(mask))
            tokens = evidence.token_weights(told, knobs.tokens)
        if self.agreed is not None and gates.consensus is not None:
            figures["consensus"] = _only(self.agreed, gated)
            parts.append(1 + gates.consensus.bound * self.agreed)
        if self.shifted is not None and self.moved is not None:
            share = skills.shift_share(self.shifted, velocity, self.answer)
            figures["shift share"] = _only(share, self.moved)
        product, weights = composed(parts, running.usual(routes), gated)
        running.note_weights(routes, product, gated)
        return Trust(weights, tokens, self.target, {"weight": weights, **figures})


def _only(values: Tensor, where: Tensor) -> Tensor:
    """NaN where a figure means nothing."""
    return torch.where(where, values, torch.full_like(values, float("nan")))


def _like(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to stand beside `like` (B, …)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
