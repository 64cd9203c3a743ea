"""The processes of one run: which one this is, who goes first, and sums over all of them.

`accelerate launch --multi_gpu …`, torchrun and, on CPUs, mpirun start several, on one machine or many; accelerate
finds them and their devices. Started plainly there is one, and nothing here does anything. The first alone writes the
run folder and reads it; what it read it shares. Others start what it has finished (encoded conditions, teachers'
differences).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from danceopd.errors import UserError
from danceopd.extract import device_of

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started: torchrun, and the kinds of MPI that accelerate knows."""
PATIENCE = timedelta(hours=6)
"""How long others wait for the first, which may have much to encode."""


class Processes:
    """`rank` of `count` processes, on `device`. With one, every method is the identity.

    UserError where a launcher was asked for several and each would run alone.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.count, self.device = 0, 1, device_of(device)
        started = _started()
        if started > 1:
            from accelerate import PartialState

            here = {"cpu": True, "backend": "gloo"} if self.device.type == "cpu" else {}
            try:
                state = PartialState(**here, timeout=PATIENCE)
            except ValueError as error:
                raise UserError(f"{started} processes were started and do not find each other ({error})") from None
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device
            if self.count != started:
                raise UserError(
                    f"{started} processes were started, and each would run alone on {self.device.type}; start them "
                    "with accelerate launch --multi_gpu or torchrun"
                )
            if dist.get_backend() == "gloo":  # whose threads, left alone, now and then abort a process that has ended
                atexit.register(_leave)

    @property
    def main(self) -> bool:
        """Whether this is the first."""
        return self.rank == 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others: they find what it made.

        When it fails in the first, which says why, the others end quietly with exit status 2.
        """
        if not self.main and self.highest([0]) == [1]:
            raise SystemExit(2)
        failed = 1
        try:
            yield
            failed = 0
        finally:
            if self.main:
                self.highest([failed])

    def add(self, tensor: Tensor) -> None:
        """Make `tensor`, on `device`, its sum over the processes: the same bits in each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The highest over the processes of each number."""
        if self.count == 1:
            return [int(number) for number in numbers]
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all(self, thing: Any) -> list[Any]:
        """What each process gives, by rank."""
        found = [thing]
        if self.count > 1:
            found *= self.count
            dist.all_gather_object(found, thing)
        return found

    def said(self, thing: Any) -> Any:
        """What the first process gives."""
        found = [thing]
        if self.count > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def shared(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The first process's tensors by name, on the CPU; the others give None."""
        if self.count == 1:
            return dict(tensors or {})
        found = {}
        for name, shape, dtype in self.said([(n, t.shape, t.dtype) for n, t in (tensors or {}).items()]):
            empty = torch.empty(shape, dtype=dtype, device=self.device)
            sent = empty if tensors is None else empty.copy_(tensors[name])
            dist.broadcast(sent, 0)
            found[name] = sent.cpu()
        return found


def _leave() -> None:
    """Let go of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _started() -> int:
    """How many processes the launcher says it started, 1 where there was none.

    `accelerate launch --cpu --num_processes 2`, and any of several machines with one GPU each, quietly starts a single
    process; the address that it leaves for the others gives it away.
    """
    said = next((os.environ[name] for name in SIZES if os.environ.get(name)), None)
    if said is None and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started only one; start them with --multi_gpu (on "
            "CPUs too, in place of --cpu), or one with --num_processes 1 and MASTER_ADDR unset"
        )
    return int(said or 1)
