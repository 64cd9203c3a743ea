"""How well a signal ranks samples of one question: its numbers (Q, G) and the truth's go in, figures come out.

AUC is over the pairs of samples of one question of which one is better: 0.5 is chance, whatever the question. Best of
G is what the top-ranked samples are worth, beside the mean sample and the best one there is (the oracle). Intervals
are 95 % bootstrap percentiles over questions: samples of one question are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from danceopd.labelfree.rewards import standard_scores

RESAMPLES, LEAST = 2000, 6
"""Bootstrap samples; questions below which nothing can be told."""
Figure = dict[str, float]


def concordance(signal: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each question (Q,) the share of unequal pairs that a signal (Q, G) orders as `truth` (Q, G) does.

    Equal numbers of the signal count half. NaN for a question whose samples are all alike, or without numbers.
    """
    better = (truth[:, :, None] > truth[:, None, :]).astype(float)
    above, level = signal[:, :, None] > signal[:, None, :], signal[:, :, None] == signal[:, None, :]
    pairs = better.sum((1, 2))
    right = (better * (above + 0.5 * level)).sum((1, 2))
    told = (pairs > 0) & np.isfinite(signal).all(1)
    return np.where(told, right / np.maximum(pairs, 1), np.nan)


def top(signal: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The truth (Q,) of each question's top-ranked sample, of several equal ones their mean; NaN without numbers."""
    numbers = np.isfinite(signal).all(1)
    first = signal == np.where(numbers[:, None], signal, 0.0).max(1, keepdims=True)
    return np.where(numbers, (first * truth).sum(1) / np.maximum(first.sum(1), 1), np.nan)


def figure(values: np.ndarray) -> Figure | None:
    """{mean, low, high, n} of one value a question; NaN does not count. None where there is none."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return None
    again = np.random.default_rng(20260622).integers(0, len(kept), (RESAMPLES, len(kept)))
    low, high = np.percentile(kept[again].mean(1), [2.5, 97.5])
    return {"mean": float(kept.mean()), "low": float(low), "high": float(high), "n": len(kept)}


def verdict(found: Figure | None, what: str = "chance") -> str:
    """What an AUC says of a signal, as the end of a sentence that begins with it."""
    if found is None or found["n"] < LEAST:
        return f"cannot be told ({0 if found is None else found['n']} questions)"
    if found["low"] > 0.5:
        return "ranks" if what == "chance" else f"agrees with {what}"
    return f"is {'worse' if found['high'] < 0.5 else 'no better'} than chance"


def against_truth(signals: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """How good the samples are, and how each signal ranks them: {mean, oracle, headroom, mixed, signals}.

    A signal has {auc, best, gain, verdict}; `gain` is its best of G minus the mean sample, on the same questions.
    """
    mean, oracle = truth.mean(1), truth.max(1)
    found: dict[str, Any] = {
        "mean": figure(mean), "oracle": figure(oracle), "headroom": figure(oracle - mean),
        "mixed": int((oracle > truth.min(1)).sum()), "signals": {},
    }  # fmt: skip
    for name, values in signals.items():
        auc, best = figure(concordance(values, truth)), top(values, truth)
        found["signals"][name] = {
            "auc": auc, "best": figure(best), "gain": figure(best - mean), "verdict": verdict(auc)
        }  # fmt: skip
    return found


def against_each_other(signals: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Without truth: how far each signal orders samples as those of other kinds do, {signals: name -> {auc, with, …}}.

    The others' order is the mean of their standard scores, each kind counting once. Two signals of one kind come from
    the same numbers, so their agreement would show nothing.
    """
    found: dict[str, Any] = {"signals": {}}
    scores = {name: standard_scores(torch.from_numpy(values)).numpy() for name, values in signals.items()}
    for name, values in signals.items():
        others: dict[str, list[np.ndarray]] = {}
        for other, score in scores.items():
            if kinds[other] != kinds[name] and np.isfinite(score).any():
                others.setdefault(kinds[other], []).append(score)
        auc = None
        if others:
            auc = figure(concordance(values, _mean([_mean(some) for some in others.values()])))
        words = verdict(auc, "the others") if others else "has no signal of another kind to be compared with"
        found["signals"][name] = {"auc": auc, "with": list(others), "verdict": words}
    return found


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Their mean (Q, G) where there are numbers; zeros, which order nothing, for a question where none has any."""
    stacked = np.stack(arrays)
    there = np.isfinite(stacked)
    return np.where(there, stacked, 0.0).sum(0) / np.maximum(there.sum(0), 1)
