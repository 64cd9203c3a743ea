"""Figures of a check of the monitor: how often confidence and the judge part ways, and when that is an alarm.

Of the rows with the highest confidence, how many are among the worst (the confident-mistake rate; by chance a quarter)?
Quartiles are taken within each probe set, since neither scores nor confidences compare between sets, and ties share
what is left of a quartile, so that chance is a quarter whatever the scores are. Intervals are 95 % bootstrap
percentiles over prompts: seeds of one prompt are not independent. The resampling is seeded and touches no global random
state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

CHANCE = 0.25
RESAMPLES = 1000
_SEED = 20260627


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """One probe set at one check: the scores (prompts, seeds), and by name confidences in those pictures, as large.

    `strength` is how much the student follows its prompt, 1: as much as its teacher; `spread` how much the pictures of
    one prompt differ (1 - mean cosine), `open_shift` how far what prompts leave open is distributed otherwise than the
    teacher's (`scorers.Exact`), where that can be read.
    """

    score: np.ndarray
    confidences: Mapping[str, np.ndarray]
    strength: float
    spread: float
    open_shift: float | None = None


Pair = tuple[np.ndarray, np.ndarray]
"""Confidence and score of a probe set, (prompts, seeds) each, higher is surer and better."""


def mistakes(sets: Sequence[Pair]) -> Interval:
    """P(score in the worst quartile | confidence in the best), over all probe sets, by prompts resampled in each."""
    sure = both = 0.0
    drawn_sure, drawn_both = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for place, (confidence, score) in enumerate(sets):
        here, those = _overlap(confidence[None], score[None])
        sure, both = sure + float(here[0]), both + float(those[0])
        again = _resampled(len(score), place)
        here, those = _overlap(confidence[again], score[again])
        drawn_sure, drawn_both = drawn_sure + here, drawn_both + those
    return _interval(both / sure, drawn_both / drawn_sure)


def spearman(sets: Sequence[Pair]) -> Interval:
    """Rank correlation of confidence and score, its mean over probe sets; 0 where either is constant."""
    value, drawn = 0.0, np.zeros(RESAMPLES)
    for place, (confidence, score) in enumerate(sets):
        again = _resampled(len(score), place)
        value += float(_rank_correlation(confidence[None], score[None])[0])
        drawn += _rank_correlation(confidence[again], score[again])
    return _interval(value / len(sets), drawn / len(sets))


def fall(before: Sequence[float], now: Sequence[float]) -> Interval:
    """How much lower the scores of the same prompts are now, as a mean."""
    lost = np.asarray(before, float) - np.asarray(now, float)
    return _interval(float(lost.mean()), lost[_resampled(len(lost), 0)].mean(1))


def quarter(values: np.ndarray) -> np.ndarray:
    """How far each of `values (…, n)` belongs to the lowest quarter, in [0, 1]; sums to n / 4. Ties share."""
    count = values.shape[-1] / 4
    edge = np.sort(values, axis=-1)[..., [int(np.ceil(count)) - 1]]
    below, level = values < edge, values == edge
    left = count - below.sum(-1, keepdims=True)
    return below + level * (left / level.sum(-1, keepdims=True))


def spread(clean: Tensor, seeds: int) -> float:
    """1 - the mean cosine between pictures of one prompt: `clean (prompts * seeds, …)`, a prompt's seeds together."""
    rows = normalize(clean.flatten(1).float(), dim=1).unflatten(0, (-1, seeds))
    cosines = rows @ rows.transpose(1, 2)
    pairs = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return 1 - float(pairs.mean()) / (seeds * (seeds - 1))


@dataclass(frozen=True)
class Limits:
    """When there is an alarm. Proposals, not published figures; a recipe may set others."""

    mistakes: float = CHANCE
    spearman: float = 0.0
    checks: int = 3
    strength: tuple[float, float] = (0.5, 2.0)
    diversity: float = 0.7
    effective: float = 0.5


@dataclass(frozen=True)
class Check:
    """One probe set at one check. `confidence` is the mean of each confidence, `scores` the mean of each prompt, `best`
    the mean score of each prompt's best picture (pass@seeds where a score is 0 or 1)."""

    score: float
    confidence: Mapping[str, float]
    strength: float
    diversity: float
    scores: Sequence[float]
    best: float | None = None
    open_shift: float | None = None


def alarms(
    limits: Limits,
    confidences: Mapping[str, tuple[Interval, Interval]],
    sets: Mapping[str, Sequence[Check]],
    share: float | None,
) -> list[str]:
    """A sentence for each limit that is passed.

    `confidences` are by name the rate of confident mistakes and the rank correlation, an alarm when their whole
    interval is on the wrong side; `sets` by name every check so far, this one last; `share` is the effective share of
    the training weights since the last check.
    """
    sentences = []
    for name, (rate, ranks) in confidences.items():
        if rate.low > limits.mistakes:
            sentences.append(
                f"of what {name} is surest of, {rate.value:.0%} is among the worst "
                f"({rate.low:.0%} to {rate.high:.0%}; {limits.mistakes:.0%} is allowed)"
            )
        if ranks.high < limits.spearman:
            sentences.append(
                f"what {name} is surer of scores less: rank correlation {ranks.value:.2f} "
                f"({ranks.low:.2f} to {ranks.high:.2f}; {limits.spearman:g} is allowed)"
            )
    for name, checks in sets.items():
        sentences += [f"{name}: {sentence}" for sentence in _alarms(limits, checks)]
    if share is not None and not share >= limits.effective:
        sentences.append(f"the weights count as {share:.0%} of their rows ({limits.effective:.0%} is the least)")
    return sentences


def _alarms(limits: Limits, checks: Sequence[Check]) -> list[str]:
    first, now, sentences = checks[0], checks[-1], []
    if not np.isfinite([now.strength, now.diversity, now.score, *now.confidence.values()]).all():
        return ["the student's velocities are not finite"]
    last = checks[-1 - limits.checks :]
    steps = list(zip(last, last[1:]))
    if len(steps) == limits.checks and all(b.score < a.score for a, b in steps):
        lost = fall(last[0].scores, now.scores)
        for name in now.confidence:
            if lost.low > 0 and all(b.confidence[name] > a.confidence[name] for a, b in steps):
                sentences.append(
                    f"{name} rose and the score fell {limits.checks} checks in a row, "
                    f"by {lost.value:.3g} ({lost.low:.3g} to {lost.high:.3g})"
                )
    low, high = limits.strength
    if not low <= now.strength <= high and abs(np.log(now.strength)) > abs(np.log(first.strength)):  # it may begin so
        how = f"{now.strength:.2g} times as much as its teacher"
        sentences.append(f"it follows its prompt {how} ({low:g} to {high:g} is allowed)")
    if now.diversity < limits.diversity:
        how = f"{now.diversity:.0%} as much as is usual"
        sentences.append(f"pictures of one prompt differ {how} ({limits.diversity:.0%} is the least)")
    return sentences


def _overlap(confidence: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (…, prompts, seeds): how many rows are believed most, and how many of them are among the worst, (…,)."""
    believed = quarter(-confidence.reshape(*confidence.shape[:-2], -1))
    worst = quarter(score.reshape(*score.shape[:-2], -1))
    return believed.sum(-1), (believed * worst).sum(-1)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's of (…, prompts, seeds), (…,)."""
    x, y = (_ranks(v.reshape(*v.shape[:-2], -1)) for v in (a, b))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), 0.0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties at their mean rank."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered, place = np.take_along_axis(values, order, -1), np.arange(values.shape[-1])
    new = np.concatenate([np.ones((*values.shape[:-1], 1), bool), ordered[..., 1:] != ordered[..., :-1]], -1)
    ends = np.concatenate([new[..., 1:], new[..., :1]], -1)
    first = np.maximum.accumulate(np.where(new, place, 0), -1)
    last = np.minimum.accumulate(np.where(ends, place, place[-1])[..., ::-1], -1)[..., ::-1]
    out = np.empty(values.shape)
    np.put_along_axis(out, order, (first + last) / 2, -1)
    return out


def _resampled(count: int, stream: int) -> np.ndarray:
    """Indices (RESAMPLES, count) of prompts drawn with replacement."""
    return np.random.default_rng([_SEED, stream]).integers(0, count, (RESAMPLES, count))


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
