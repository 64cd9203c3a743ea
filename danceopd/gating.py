"""The gates of one lesson: what its rows are asked besides, and what the answers make of each row.

`walk` takes the rows to their queries, some to critical steps. `ask` puts all frozen questions at a state, before the
student answers with a gradient; `Heard.trust` then weighs the rows by what the student said. The equations are in
evidence.py, consensus.py and skills.py, the weights' composition in gates.py; docs/labelfree.md tells them together.
A row that is asked with the null prompt, or lacks what a gate asks for, passes that gate with weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danceopd import consensus, evidence, skills
from danceopd.fields import VelocityField
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
    told by guidance, `ranked` (B,) bool those whose pictures are ranked. `strengths` are fields by teacher, for each
    further strength. `critical` (B,) bool rows ask at critical steps, by `keys` (B, steps). `grid` are rows and
    columns of tokens, and `sources` (B, …) the sources' latents on that very grid, where there are such. `ranked`,
    `critical` and `keys` lie on the CPU, for walks are planned by them.
    """

    gates: Gates
    running: Running
    gated: Tensor
    asked: dict[str, As]
    contrasts: list[str | None]
    guided: list[int]
    ranked: Tensor
    strengths: Sequence[Sequence[VelocityField]]
    critical: Tensor
    keys: Tensor
    guide: skills.Guide
    grid: tuple[int, int] | None = None
    sources: Tensor | None = None
    ends: Tensor | None = None

    def walk(self, lesson: Lesson) -> Tensor:
        """States (B, K, …) at the rows' queries; critical rows move theirs to steps that decided something.

        Only those rows walk to the end of the candidates. Rows whose finished pictures are ranked walk to theirs.
        """
        stops, levels = lesson.stops, lesson.levels
        finish = self.gates.consensus is not None and self.gates.consensus.outputs == "walk" and bool(self.ranked.any())
        knobs, steps = self.gates.skills, len(lesson.sigmas) - 1
        choose = knobs is not None and bool(self.critical.any())
        if not choose and not finish:
            return lesson.walk(stops, levels)
        count, own, grid = stops.shape[1], stops[:, :1], lesson.sigmas.float()
        last = skills.candidates(steps, knobs.until) if choose and knobs is not None else 0
        every, to = [stops], [levels]

        def also(rows: Tensor, ahead: Tensor) -> None:
            """Let some rows see grid points `ahead`; the others see their own query again."""
            every.append(torch.where(rows[:, None], ahead, own))
            to.append(torch.where(rows[:, None], grid[ahead], levels[:, :1]))

        if choose:  # the candidates, and the state after the last of them
            also(self.critical, torch.cat([torch.arange(last), torch.tensor([last + 1])]))
        if finish:
            also(self.ranked, torch.tensor([steps]))
        watch = skills.Criticality(lesson.sigmas, len(stops), lesson.device) if choose else None
        seen = lesson.walk(torch.cat(every, dim=1), torch.cat(to, dim=1), watch)
        if finish:
            self.ends = seen[:, -1]
        if watch is None or knobs is None:
            return seen[:, :count]
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
            if name.startswith("framing") or (name == WRONG and self._live):
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

    @property
    def _live(self) -> bool:
        return self.gates.consensus is not None and self.gates.consensus.target == "live-self"

    def _consensus(self, heard: Heard, found: dict[str, Tensor]) -> None:
        """Answers to the framings, and how far they agree."""
        knobs, x, sigma, lesson = self.gates.consensus, heard.x, heard.sigma, heard.lesson
        if knobs is None:
            return
        fields: Sequence[VelocityField] = lesson.fields.teachers
        every = list(range(len(x)))
        framed, there = [heard.answer], [self.gated]
        if self._live:
            fields = [lesson.fields.walk] * len(fields)
            framed = [lesson.ask_as(every, lesson.condition, x, sigma, fields)]
        others: list[tuple[As, Sequence[VelocityField]]] = [
            (one, fields) for name, one in self.asked.items() if name.startswith("framing")
        ]
        if knobs.by == "strength":
            rows = [row for row, gated in enumerate(self.gated.tolist()) if gated]
            same = As(rows, lesson.condition.rows(rows))
            others = [(same, strengths) for strengths in self.strengths] if rows else []
        for one, asked in others:
            framed.append(heard.filled(one.rows, lesson.ask_as(one.rows, one.condition, x, sigma, asked)))
            there.append(heard.marked(one.rows))
        answers, given = torch.stack(framed), torch.stack(there)
        agreed, wrong = torch.zeros(len(x), device=x.device), self.asked.get(WRONG)
        if wrong is not None:
            said = found[WRONG] if WRONG in found else lesson.ask_as(wrong.rows, wrong.condition, x, sigma, fields)
            agreed = consensus.agreement(answers, given & heard.marked(wrong.rows), heard.filled(wrong.rows, said))
        if self._live:  # its own word is reported, and weighs nothing
            heard.own = agreed
            heard.target = torch.where(
                _like(given.sum(0) > 1, x), consensus.mean_answer(answers, given), heard.target
            )
        else:
            heard.agreed = agreed

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

    `away` is the answer to the contrast where a row is `contrasted`, `agreed` and `own` agreements of frozen fields
    and of the student, `shifted` what the target moved by on the rows that `moved`.
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
    own: Tensor | None = None
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
        ranked = gating.ranked.to(gated.device)
        if any(contrast is not None for contrast in gating.contrasts):
            difference = self.answer - self.away
            mask = evidence.edit_mask(difference, gating.grid)
            rho = evidence.progress(velocity, self.away, difference)
            sound = self.contrasted & evidence.informative(difference, self.answer)
            figures["rho"] = _only(rho, sound)
            figures["delta positive"] = _only((rho > 0.5).float(), sound)
            figures["leak"] = _only(evidence.leak(velocity, self.answer, mask), sound)
            if gates.evidence is not None:
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
            rank = self._ranks(velocity, mask, rho, sound & ranked)
            if rank is not None and gates.consensus is not None:
                figures["rank"] = _only(rank, ranked)
                parts.append(1 + gates.consensus.rank * rank)
        if self.agreed is not None and gates.consensus is not None:
            figures["consensus"] = _only(self.agreed, gated)
            parts.append(1 + gates.consensus.bound * self.agreed)
        if self.own is not None:
            figures["self consensus"] = _only(self.own, gated)
        if self.shifted is not None and self.moved is not None:
            share = skills.shift_share(self.shifted, velocity, self.answer)
            figures["shift share"] = _only(share, self.moved)
        product, weights = composed(parts, running.usual(routes), gated)
        running.note_weights(routes, product, gated)
        return Trust(weights, tokens, self.target, {"weight": weights, **figures})

    def _ranks(self, velocity: Tensor, mask: Tensor, rho: Tensor, ranked: Tensor) -> Tensor | None:
        """Ranks (B,) of the pictures that the `ranked` rows are on their way to, among their siblings."""
        gating, knobs = self.gating, self.gating.gates.consensus
        if knobs is None or not bool(gating.ranked.any()):
            return None
        group, level = gating.gates.group, _like(self.sigma, self.x)
        pictures = self.x - level * velocity if gating.ends is None else gating.ends
        # The source, or where its latents lie on another grid: what the teacher draws when it is asked for nothing.
        before = self.x - level * self.away if gating.sources is None else gating.sources
        change, where = pictures - before, consensus.mean_mask(mask, group)
        kept = consensus.preservation(change, where)
        rank = consensus.ranks(
            consensus.likeness(change, where, group), rho.clamp(0, 1), kept, (knobs.edited, knobs.kept), group
        )
        return torch.where(ranked, rank, torch.zeros_like(rank))


def _only(values: Tensor, where: Tensor) -> Tensor:
    """NaN where a figure means nothing."""
    return torch.where(where, values, torch.full_like(values, float("nan")))


def _like(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to stand beside `like` (B, …)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
