"""`collective`: torch.distributed point to point, along the plan: gloo for CPU memory.

Every batch is packed into one staging buffer of little more than `plan.COPY_BYTES` and sent to its receiver. The
process group is this transport's own, beside the ones the engines use; a failed attempt discards it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zerokl.weightsync.plan import Batch
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import pack, unpack

_CONNECT = timedelta(seconds=20)
_SLICE_S = 0.05


class _Group:
    """The process group of all sending and receiving ranks: senders first."""

    def __init__(self, folder: Path, ranks: tuple[int, int], interface: str) -> None:
        """``folder``: shared by all ranks, for the rendezvous; ``interface``: what gloo listens on."""
        self._folder, self._interface = folder, interface
        self.sources, self._size = ranks[0], sum(ranks)
        self._group: Any = None  # torch's stubs know no method of it
        self.name = b""
        """The attempt that formed the group; empty while there is none. What every rank announces."""

    def get(self, job: Job, rank: int, announced: Mapping[str, bytes]) -> Any:
        """The group that all ranks announced, or else a new one. Raises TransferError if somebody does not come."""
        if self._group is None or set(announced.values()) != {self.name}:
            self.drop()
            store = dist.FileStore(str(self._folder / f"{job.attempt.hex()}.store"), self._size)
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(interface=self._interface)]
            options._timeout = min(_CONNECT, timedelta(seconds=max(0.1, job.deadline - time.monotonic())))
            try:
                self._group = gloo(store, rank, self._size, options)
            except RuntimeError as error:
                raise TransferError(f"the ranks did not all connect: {error}") from error
            self.name = job.attempt
        return self._group

    def drop(self) -> None:
        self._group, self.name = None, b""


def _wait(work: dist.Work, job: Job, what: str) -> None:
    """Wait for one transfer, and notice the end of the attempt meanwhile.

    gloo closes the connection when a wait of its own times out, and offers no way to call one off. So the wait is left
    to a thread; one that is abandoned ends by the attempt's deadline and touches staging memory only.
    """
    done: Future[None] = Future()

    def wait() -> None:
        try:
            work.wait(timedelta(seconds=max(0.1, job.deadline - time.monotonic())))
            done.set_result(None)
        except RuntimeError as error:
            done.set_exception(TransferError(f"failed: {what}: {error}"))

    threading.Thread(target=wait, daemon=True).start()
    while True:
        job.check(what)
        with contextlib.suppress(TimeoutError):
            return done.result(_SLICE_S)


class CollectiveSource:
    """Sends its batches in the plan's order, one to each receiver at a time."""

    name = "collective"

    def __init__(self, folder: Path, *, ranks: tuple[int, int], interface: str = "lo") -> None:
        self._group = _Group(folder, ranks, interface)
        self._buffers: Buffers = {}
        self._done = True

    def prepare(self, job: Job, buffers: Buffers) -> bytes:  # noqa: ARG002
        self._buffers = buffers
        return self._group.name

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        self._done = False
        group = self._group.get(job, job.rank, endpoints)
        for turn in _turns(job.sent(), lambda batch: batch.target):
            sending = []
            for batch in turn:
                data = pack(self._buffers, batch)
                sending.append((group.send([data], self._group.sources + batch.target, 0), batch, data))
            for work, batch, _ in sending:
                _wait(work, job, f"rollout-{batch.target} to receive")
        self._done = True
        return sum(batch.nbytes for batch in job.sent())

    def finish(self) -> None:
        self._buffers = {}
        if not self._done:
            self._group.drop()


class CollectiveTarget:
    """Receives its batches in the plan's order, one from each sender at a time."""

    name = "collective"

    def __init__(self, folder: Path, *, ranks: tuple[int, int], interface: str = "lo") -> None:
        self._group = _Group(folder, ranks, interface)
        self._room = Room({})
        self._done = True

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._room = room
        return self._group.name

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        self._done = False
        group = self._group.get(job, self._group.sources + job.rank, endpoints)
        buffers, copied = self._room.all(), 0
        for turn in _turns(job.received(), lambda batch: batch.source):
            coming = []
            for batch in turn:
                data = torch.empty(batch.nbytes, dtype=torch.uint8)
                coming.append((group.recv([data], batch.source, 0), batch, data))
            for work, batch, data in coming:
                _wait(work, job, f"trainer-{batch.source} to send")
                unpack(buffers, batch, data)
                copied += batch.nbytes
        self._done = True
        return Arrived(buffers, copied)

    def finish(self) -> None:
        if not self._done:
            self._group.drop()


def _turns(batches: list[Batch], peer: Callable[[Batch], int]) -> list[list[Batch]]:
    """The batches in rounds with at most one per peer, each peer's in order."""
    turns: list[list[Batch]] = []
    seen: dict[int, int] = {}
    for batch in batches:
        number = seen.get(peer(batch), 0)
        seen[peer(batch)] = number + 1
        if number == len(turns):
            turns.append([])
        turns[number].append(batch)
    return turns
