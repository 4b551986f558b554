"""`collective`: torch.distributed point to point, along the plan: gloo for CPU memory, NCCL for that of GPUs.

Every batch is packed into one staging buffer of little more than `plan.COPY_BYTES` and sent to its receiver. The
process group is this transport's own, beside the ones the engines use; a failed attempt discards it. The NCCL half has
not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from zerokl.weightsync.plan import Batch
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import pack, unpack

_CONNECT = timedelta(seconds=20)
_SLICE_S = 0.05
_POLL_S = 0.0005
_CPU = torch.device("cpu")

T = TypeVar("T")


class _Group:
    """The process group of all sending and receiving ranks: senders first."""

    def __init__(self, folder: Path, ranks: tuple[int, int], interface: str, device: torch.device) -> None:
        """``folder``: shared by all ranks, for the rendezvous; ``interface``: what gloo listens on; ``device``: where
        the bytes are, and with that the library."""
        self._folder, self._interface, self.device = folder, interface, device
        self.sources, self._size = ranks[0], sum(ranks)
        self._group: Any = None  # torch's stubs know no method of it
        self.name = b""
        """The attempt that formed the group; empty while there is none. What every rank announces."""

    def get(self, job: Job, rank: int, announced: Mapping[str, bytes]) -> Any:
        """The group that all ranks announced, or else a new one. Raises TransferError if somebody does not come."""
        if self._group is None or set(announced.values()) != {self.name}:
            self.drop()
            store = dist.FileStore(str(self._folder / f"{job.attempt.hex()}.store"), self._size)
            timeout = min(_CONNECT, timedelta(seconds=max(0.1, job.deadline - time.monotonic())))
            connect = functools.partial(self._connect, store, rank, timeout)
            self._group = _abandonable(connect, job, "all ranks to connect", "the ranks did not all connect")
            self.name = job.attempt
        return self._group

    @property
    def nccl(self) -> bool:
        return self.device.type == "cuda"

    def drop(self) -> None:
        if self._group is not None and self.nccl:
            self._group.abort()  # kernels that wait for a lost peer would wait forever
        self._group, self.name = None, b""

    def _connect(self, store: dist.Store, rank: int, timeout: timedelta) -> Any:
        if self.nccl:
            nccl: Any = dist.ProcessGroupNCCL
            settings = nccl.Options()
            settings._timeout = timeout
            torch.cuda.set_device(self.device)
            return nccl(store, rank, self._size, settings)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(interface=self._interface)]
        options._timeout = timeout
        return gloo(store, rank, self._size, options)


def _post(start: Callable[[], dist.Work], what: str) -> dist.Work:
    """Begin one transfer; a connection that is known to be lost is noticed here already."""
    try:
        return start()
    except RuntimeError as error:
        raise TransferError(f"failed: {what}: {error}") from error


def _wait(work: dist.Work, job: Job, what: str, *, nccl: bool) -> None:
    """Wait for one transfer, and notice the end of the attempt meanwhile.

    gloo closes the connection when a wait of its own times out, and offers no way to call one off; one that is
    abandoned touches staging memory only. NCCL's wait does not block: it is done when its work is.
    """

    def wait() -> None:
        while nccl and not work.is_completed() and not job.cancelled.is_set():
            time.sleep(_POLL_S)
        work.wait(timedelta(seconds=max(0.1, job.deadline - time.monotonic())))

    _abandonable(wait, job, what, f"failed: {what}")


def _abandonable(action: Callable[[], T], job: Job, what: str, failed: str) -> T:
    """The result of a call that cannot be called off: left to a thread, which ends by the call's own deadline, if the
    attempt ends before. Raises TransferError, beginning with ``failed``, if the call fails."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except RuntimeError as error:
            done.set_exception(TransferError(f"{failed}: {error}"))

    threading.Thread(target=run, daemon=True).start()
    while True:
        job.check(what)
        with contextlib.suppress(TimeoutError):
            return done.result(_SLICE_S)


class CollectiveSource:
    """Sends its batches in the plan's order, one to each receiver at a time."""

    name = "collective"

    def __init__(
        self, folder: Path, *, ranks: tuple[int, int], interface: str = "lo", device: torch.device = _CPU
    ) -> None:
        self._group = _Group(folder, ranks, interface, device)
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
                data, to = pack(self._buffers, batch), self._group.sources + batch.target
                work = _post(functools.partial(group.send, [data], to, 0), f"sending to rollout-{batch.target}")
                sending.append((work, batch, data))
            for work, batch, _ in sending:
                _wait(work, job, f"rollout-{batch.target} to receive", nccl=self._group.nccl)
        self._done = True
        return sum(batch.nbytes for batch in job.sent())

    def finish(self) -> None:
        self._buffers = {}
        if not self._done:
            self._group.drop()


class CollectiveTarget:
    """Receives its batches in the plan's order, one from each sender at a time."""

    name = "collective"

    def __init__(
        self, folder: Path, *, ranks: tuple[int, int], interface: str = "lo", device: torch.device = _CPU
    ) -> None:
        self._group = _Group(folder, ranks, interface, device)
        self._room = Room({})
        self._done = True

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._room = room if self._group.device.type == "cpu" else room.on(self._group.device, self._room)
        return self._group.name

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        self._done = False
        group = self._group.get(job, self._group.sources + job.rank, endpoints)
        buffers, copied = self._room.all(), 0
        for turn in _turns(job.received(), lambda batch: batch.source):
            coming = []
            for batch in turn:
                data = torch.empty(batch.nbytes, dtype=torch.uint8, device=self._group.device)
                start = functools.partial(group.recv, [data], batch.source, 0)
                coming.append((_post(start, f"receiving from trainer-{batch.source}"), batch, data))
            for work, batch, data in coming:
                _wait(work, job, f"trainer-{batch.source} to send", nccl=self._group.nccl)
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
