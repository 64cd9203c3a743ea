"""What an audit found: the answered questions go in, each signal's figures, cost and sentence come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danceopd.labelfree.audit.figures import against_each_other, against_truth
from danceopd.labelfree.audit.signals import Signal
from danceopd.labelfree.rewards import combined
from danceopd.recipe.nft import NFT

RESULT, TOGETHER = "audit.json", "all rewards"


def audit_folder(output: Path) -> Path:
    """Where the audit of a run lies if nothing else is said: beside its folder."""
    return output.with_name(f"{output.name}-audit")


def summary(
    capability: str, lines: Sequence[Mapping[str, Any]], signals: Mapping[str, Signal], rewards: NFT
) -> dict[str, Any]:
    """The figures of one teacher's questions, `lines` with `truth`, `judge`, `signals` and `seconds`, as plain data.

    Questions whose truth is known are compared with it; where there is none, signals are compared with each other.
    """
    values = {name: np.array([line["signals"][name] for line in lines], float) for name in signals}
    asked = [name for name, one in signals.items() if one.asked]
    if len(asked) > 1:
        weights = {name: rewards.rewards[name.removeprefix("reward ")].weight for name in asked}
        scores = combined({name: torch.from_numpy(values[name]) for name in asked}, weights)
        values[TOGETHER] = scores.double().numpy()
        every = replace(signals[asked[0]], kind=TOGETHER, forwards=sum(signals[name].forwards for name in asked))
        signals = {**signals, TOGETHER: every}
    judged = [n for n, line in enumerate(lines) if line["truth"] is not None]
    if judged:
        truth = np.array([lines[n]["truth"] for n in judged], float)
        found = against_truth({name: of[judged] for name, of in values.items()}, truth)
    else:
        kinds = {name: one.kind for name, one in signals.items() if name != TOGETHER}
        found = against_each_other({name: values[name] for name in kinds}, kinds)
    for name, figures in found["signals"].items():
        parts = asked if name == TOGETHER else [name]
        spent = np.mean([sum(line["seconds"][part] for part in parts) for line in lines])
        figures |= {"asked": signals[name].asked, "kind": signals[name].kind, "forwards": signals[name].forwards}
        figures |= {"seconds": float(spent), "sentence": f"{name} {figures['verdict']}"}
    about = {"capability": capability, "questions": len(judged) or len(lines)}
    about |= {"truth": lines[judged[0]]["judge"] if judged else None}
    return {**about, "drawing_seconds": float(np.mean([line["seconds"]["drawing"] for line in lines])), **found}
