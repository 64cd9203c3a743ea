"""`save_state`, `load_state`: weights, their average and the optimizers' state in one safetensors file.

Written to a partial file and renamed, so an interrupted save leaves the previous state whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from danceopd.common.files import disk_errors
from danceopd.common.parse import parse_json
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
    partial = folder / (NAME + ".partial")
    notes = {"step": str(step), "meta": json.dumps(meta, sort_keys=True)}
    with disk_errors(folder / NAME):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, partial, metadata=notes)
        os.replace(partial, folder / NAME)


@torch.no_grad()
def load_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    meta: Mapping[str, object],
) -> int:
    """Load the saved state into the weights, the average and the optimizers; returns its step, 0 without a state.

    UserError where the state is damaged, or was saved by a training with another `meta`.
    """
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata()
        step, before = int(notes["step"]), dict(parse_json(notes["meta"]))
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to begin this training anew") from None
    now = json.loads(json.dumps(meta))
    before.setdefault("init_sha256", None)  # a state of before there was --init
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise UserError(
                f"{path} holds a training with another {key} ({before[key]} there, {now[key]} here); give the same, or "
                "another --output"
            )
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
