"""`Processes`: the rank and device of this process in a run, and the collectives that training needs.

`accelerate launch --multi_gpu …`, torchrun and, on CPUs, mpirun start several processes on one machine or many;
accelerate finds them and their devices. In a single process every collective is the identity. Only the main process,
rank 0, reads and writes the run folder, and broadcasts what it read.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from danceopd.common.messages import clipped
from danceopd.common.system import resolve_device
from danceopd.errors import UserError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes: of torchrun, and of the kinds of MPI that accelerate knows."""
TIMEOUT = timedelta(hours=6)
"""How long the others wait for the main process, which may have much to encode."""
LOST_GRACE = 15.0
"""Seconds in which a process may end by itself after another one was lost."""
_LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|closed by peer|Broken pipe|NCCL|[Tt]imed out|gloo|recvValue|sendBytes"
)
_SENTENCE = (
    "another process of this run has ended, so this one ends as well; its own message says why: start all of them "
    "again to continue"
)


class Processes:
    """This process: `rank` of `world_size`, on `device`. With one process every method is the identity.

    UserError when a launcher was asked for several processes and each would run alone.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.world_size, self.device = 0, 1, resolve_device(device)
        started = _launched_processes()
        if started > 1:
            from accelerate import PartialState

            here = {"cpu": True, "backend": "gloo"} if self.device.type == "cpu" else {}
            try:
                state = PartialState(**here, timeout=TIMEOUT)
            except ValueError as error:
                raise UserError(f"{started} processes were started and do not find each other ({error})") from None
            self.rank, self.world_size, self.device = state.process_index, state.num_processes, state.device
            if self.world_size != started:
                raise UserError(
                    f"{started} processes were started, and each would run alone on {self.device.type}; start them "
                    "with accelerate launch --multi_gpu or torchrun"
                )
            if dist.get_backend() == "gloo":  # whose threads, left alone, now and then abort a process that has ended
                atexit.register(_destroy_process_group)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, rank 0."""
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A context that runs in the main process and then in the others, which find the files that it made.

        When it fails in the main process, which reports why, the others end without a message with exit status 2.
        """
        if not self.is_main and self.all_max([0]) == [1]:
            raise SystemExit(2)
        failed = 1
        try:
            yield
            failed = 0
        finally:
            if self.is_main:
                self.all_max([failed])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which this process ends, with a sentence, soon after another one of the run has died.

        A process that leaves it without an error, or with SystemExit, may go. Each keeps a connection to the first
        one: the operating system closes it, however a process ends, and however long the others compute.
        """
        if self.world_size == 1:
            yield
            return
        peers = self._connect()
        try:
            yield
        except SystemExit:
            _leave(peers)
            raise
        except RuntimeError as error:
            if _LOST.search(str(error)):
                raise UserError(f"{_SENTENCE} ({clipped(str(error), 150)})") from error
            raise
        _leave(peers)

    def _connect(self) -> list[socket.socket]:
        """Connections to the other processes (of the others: to the first), each watched by a thread."""
        peers: list[socket.socket] = []
        server = socket.create_server(("", 0)) if self.is_main else None
        mine = (secrets.token_bytes(16), server.getsockname()[1]) if server is not None else None
        token, port = self.broadcast(mine)

        def accept(server: socket.socket) -> None:
            server.settimeout(60)
            with suppress(OSError), server:
                while len(peers) < self.world_size - 1:
                    peer, _ = server.accept()
                    peer.settimeout(10)
                    if peer.recv(len(token), socket.MSG_WAITALL) == token:
                        watch(peer)

        def watch(peer: socket.socket) -> None:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, seconds in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
                if hasattr(socket, name):  # a machine that lost its power closes nothing
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
            peers.append(peer)
            threading.Thread(target=_until_lost, args=(peer,), daemon=True).start()

        if server is not None:
            threading.Thread(target=accept, args=(server,), daemon=True).start()
        else:
            with suppress(OSError):  # a firewall: this process is not watched
                peer = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), 30)
                peer.sendall(token)
                watch(peer)
        return peers

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor`, on `device`, over the processes in place: the same bits in each."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def all_max(self, numbers: Sequence[int]) -> list[int]:
        """The maximum of each number over the processes."""
        if self.world_size == 1:
            return [int(number) for number in numbers]
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather(self, thing: Any) -> list[Any]:
        """The objects of all processes, by rank."""
        found = [thing]
        if self.world_size > 1:
            found *= self.world_size
            dist.all_gather_object(found, thing)
        return found

    def broadcast(self, thing: Any) -> Any:
        """The object of the main process, in every process."""
        found = [thing]
        if self.world_size > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The main process's tensors by name, on the CPU of every process; the others give None."""
        if self.world_size == 1:
            return dict(tensors or {})
        found = {}
        for name, shape, dtype in self.broadcast([(n, t.shape, t.dtype) for n, t in (tensors or {}).items()]):
            empty = torch.empty(shape, dtype=dtype, device=self.device)
            sent = empty if tensors is None else empty.copy_(tensors[name])
            dist.broadcast(sent, 0)
            found[name] = sent.cpu()
        return found


def _until_lost(peer: socket.socket) -> None:
    """Wait for a process's leave; where it dies instead, end this one, which may be in a collective for ever."""
    try:
        said = peer.recv(1)
    except OSError:
        said = b""
    if not said:
        time.sleep(LOST_GRACE)
        print(f"error: {_SENTENCE}", file=sys.stderr, flush=True)
        os._exit(2)


def _leave(peers: list[socket.socket]) -> None:
    for peer in peers:
        with suppress(OSError):
            peer.sendall(b".")


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _launched_processes() -> int:
    """How many processes the launcher says it started; 1 without a launcher.

    `accelerate launch --cpu --num_processes 2`, and any of several machines with one GPU each, quietly starts a single
    process; the address that it leaves for the others gives it away.
    """
    given = next((os.environ[name] for name in SIZES if os.environ.get(name)), None)
    if given is None and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started only one; start them with --multi_gpu (on "
            "CPUs too, in place of --cpu), or one with --num_processes 1 and MASTER_ADDR unset"
        )
    return int(given or 1)
