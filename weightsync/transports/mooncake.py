"""`mooncake`: Mooncake's transfer engine, one-sided writes into the receivers' memory; CPU memory, over TCP or RDMA.

An adapter for clusters that run it already. The package is optional: `mooncake-transfer-engine-non-cuda` (or
`mooncake-transfer-engine` beside CUDA), which wants the system's libibverbs. Its server takes writes to registered
memory from whoever reaches its port and knows an address, so it belongs on a network of the run's own.

A write has returned when the receiver's engine acknowledged it, and receivers are asked for digests only after every
sender has reported: so a receiver waits for nothing here.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec
import torch

from zerokl.weightsync.layout import Typed
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Batch
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.rdma import check_places, runs

_NO_METADATA_SERVER = "P2PHANDSHAKE"
_POLL_S = 0.002
_REMEDY = "pip install mooncake-transfer-engine-non-cuda, and the system's libibverbs and libnl-3"


class Registered(Typed, frozen=True):
    """A receiver's engine (host:port), and its buffers: name -> address, bytes."""

    server: Annotated[str, msgspec.Meta(min_length=3, max_length=300)]
    buffers: dict[str, tuple[int, int]]


class _Engine:
    """One transfer engine and the memory registered with it."""

    def __init__(self, host: str, protocol: str, devices: str) -> None:
        try:
            module: Any = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransferError(f"the mooncake transport cannot load its package ({error}): {_REMEDY}") from error
        self.api = module.TransferEngine()
        if self.api.initialize(host, _NO_METADATA_SERVER, protocol, devices):
            raise TransferError(f"mooncake does not start on {host!r} with protocol {protocol!r}, devices {devices!r}")
        self.server = f"{host}:{self.api.get_rpc_port()}"
        self._registered: list[int] = []

    def register(self, buffers: Buffers) -> None:
        """Register these buffers and no others any more."""
        self.forget()
        places = [(buffer.data_ptr(), buffer.numel()) for buffer in buffers.values()]
        if self.api.batch_register_memory([place for place, _ in places], [size for _, size in places]):
            raise TransferError(f"mooncake refused to register {sum(size for _, size in places)} bytes of memory")
        self._registered = [place for place, _ in places]

    def forget(self) -> None:
        """Take back every registration: nobody can write here with what they were told before."""
        if self._registered and self.api.batch_unregister_memory(self._registered):
            raise TransferError("mooncake did not take back registered memory")
        self._registered = []


class MooncakeSource:
    """Writes into the receivers' memory, one receiver after the other."""

    name = "mooncake"

    def __init__(self, host: str = "127.0.0.1", *, protocol: str = "tcp", devices: str = "") -> None:
        """``host``: this machine as the receivers know it; ``protocol`` "tcp" or "rdma", over ``devices``."""
        self._engine = _Engine(host, protocol, devices)
        self._buffers: Buffers = {}

    def prepare(self, job: Job, buffers: Buffers) -> bytes:
        names = dict.fromkeys(copy.source_buffer for batch in job.sent() for copy in batch.copies)
        self._buffers = {name: buffers[name] for name in names}
        self._engine.register(self._buffers)
        return b""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        batches: dict[str, list[Batch]] = {}
        for batch in job.sent():
            batches.setdefault(name_of(source=False, rank=batch.target), []).append(batch)
        for name, held in batches.items():
            self._write(job, name, parse(endpoints.get(name, b"")), held)
        return sum(batch.nbytes for batch in job.sent())

    def finish(self) -> None:
        self._engine.forget()
        self._buffers = {}

    def _write(self, job: Job, name: str, target: Registered, batches: list[Batch]) -> None:
        copies = [copy for batch in batches for copy in batch.copies]
        missing = sorted({c.target_buffer for c in copies} - target.buffers.keys())
        if missing:
            raise TransferError(f"{name} registered no buffer {missing[0]!r}")
        sources = {key: (buffer.data_ptr(), buffer.numel()) for key, buffer in self._buffers.items()}
        here = runs([(sources[c.source_buffer], c.source_offset, c.source_pitch, c) for c in copies])
        there = runs([(target.buffers[c.target_buffer], c.target_offset, c.target_pitch, c) for c in copies])
        arguments = target.server, here[:, 0].tolist(), there[:, 0].tolist(), here[:, 1].tolist()
        done: Future[int] = Future()
        read = self._buffers

        def write() -> None:
            done.set_result(self._engine.api.batch_transfer_sync_write(*arguments))
            read.keys()  # keeps the memory that is read until here, should the attempt end before the call does

        # the call waits: left to a thread, so that the end of the attempt is noticed meanwhile
        threading.Thread(target=write, daemon=True).start()
        while not done.done():
            job.check(f"writes to {name}")
            job.cancelled.wait(_POLL_S)
        if done.result():
            raise TransferError(f"the write to {name} at {target.server} failed: {done.result()}")


class MooncakeTarget:
    """Registers its memory; the senders do the rest."""

    name = "mooncake"

    def __init__(self, host: str = "127.0.0.1", *, protocol: str = "tcp", devices: str = "") -> None:
        """``host``: this machine as the senders know it; ``protocol`` "tcp" or "rdma", over ``devices``."""
        self._engine = _Engine(host, protocol, devices)
        self._buffers: dict[str, torch.Tensor] = {}

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._buffers = room.all()
        self._engine.register(self._buffers)
        places = {name: (buffer.data_ptr(), buffer.numel()) for name, buffer in self._buffers.items()}
        return msgspec.msgpack.encode(Registered(self._engine.server, places))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:  # noqa: ARG002  (senders come here)
        return Arrived(self._buffers, 0)

    def finish(self) -> None:
        self._engine.forget()  # a sender that wakes up late must not write here
        self._buffers = {}


def parse(data: bytes) -> Registered:
    """Decode what a receiver announced. Raises TransferError for anything but that."""
    try:
        found = msgspec.msgpack.decode(data, type=Registered)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not a mooncake registration: {error}") from error
    check_places(found.buffers)
    return found
