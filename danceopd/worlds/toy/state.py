"""`save_state`, `load_state`: weights, their average and the optimizers' state in one safetensors file.

Written to a partial file and renamed, so an interrupted save leaves the previous state whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from danceopd.errors import UserError

NAME = "training.safetensors"


def save_state(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    meta: Mapping[str, object],
) -> None:
    """Write the state after ``step`` updates; ``meta`` describes the training and is stored with it."""
    tensors = {f"weight/{n}": p.detach() for n, p in weights.items()}
    tensors |= {f"average/{n}": p for n, p in average.items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (NAME + ".partial")
    notes = {"step": str(step), "meta": json.dumps(meta, sort_keys=True)}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, partial, metadata=notes)
    os.replace(partial, folder / NAME)


@torch.no_grad()
def load_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> int:
    """Load the saved state into the weights, the average and the optimizers; returns its step, 0 without a state."""
    path = folder / NAME
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    names = {n.removeprefix("weight/") for n in tensors if n.startswith("weight/")}
    if names != set(weights):
        raise UserError(f"{path} holds the training of another model; name another folder or remove it")
    for name, weight in weights.items():
        weight.copy_(tensors[f"weight/{name}"])
        average[name].copy_(tensors[f"average/{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer/{i}/"
        for name, value in tensors.items():
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split("/")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step
