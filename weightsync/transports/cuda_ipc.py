"""`cuda_ipc`: both sides on GPUs of one machine. The sender's pool is opened by handle; bytes go device to device.

The sender copies what it sends into a pool of its own, allocated by the driver, during PREPARE; receivers open the pool
and copy from there into their shadow buffers. That second copy is made on purpose: memory opened by handle ends with
the process that exported it, and an engine must outlive its trainer. Nothing passes through host memory.

A handle is data, not code: 64 bytes, the device's UUID, the pool's size, a nonce that the pool itself begins with, and
where each buffer lies. Receivers check all of it against what they have opened. Buffers are bytes here; what they mean
(dtype and shape) is in the layouts that both sides have compared by then.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch

from zerokl.weightsync.layout import Typed
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Batch
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import target_view, view
from zerokl.weightsync.transports.cuda_driver import HANDLE_BYTES, UUID_BYTES, Driver

ALIGNMENT = 512
POOL_BYTES = 2 << 20
"""Pools are multiples of this: of a smaller allocation the driver would share what else lies in the same block."""
NONCE_BYTES = 16


class Export(Typed, frozen=True):
    """A sender's pool, and what lies where in it (buffer -> offset, bytes)."""

    handle: Annotated[bytes, msgspec.Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]
    device: Annotated[bytes, msgspec.Meta(min_length=UUID_BYTES, max_length=UUID_BYTES)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    nbytes: int
    buffers: dict[str, tuple[int, int]]


class CudaIpcSource:
    """Copies into its pool and announces it. The pool stays allocated from one version to the next."""

    name = "cuda_ipc"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._pool, self._size = 0, 0
        self._copied = 0

    def prepare(self, job: Job, buffers: Buffers) -> bytes:
        places, end = {}, ALIGNMENT  # the nonce comes first
        for name in dict.fromkeys(copy.source_buffer for batch in job.sent() for copy in batch.copies):
            places[name] = end, buffers[name].numel()
            end += -(-buffers[name].numel() // ALIGNMENT) * ALIGNMENT
        if end > self._size:
            self.close()
            end = -(-end // POOL_BYTES) * POOL_BYTES
            self._pool, self._size = self._driver.allocate(end), end
        pool, nonce = self._driver.view(self._pool, self._size), secrets.token_bytes(NONCE_BYTES)
        pool[:NONCE_BYTES] = torch.frombuffer(bytearray(nonce), dtype=torch.uint8).to(pool.device)
        for name, (offset, size) in places.items():
            pool[offset : offset + size].copy_(buffers[name])
        self._driver.synchronise()
        self._copied = sum(size for _, size in places.values())
        handle = self._driver.export(self._pool)
        return msgspec.msgpack.encode(Export(handle, self._driver.uuids()[0], nonce, self._size, places))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:  # noqa: ARG002  (receivers come here)
        return self._copied

    def finish(self) -> None:
        """The pool is kept; its next use gives it another nonce."""

    def close(self) -> None:
        """Give the pool back. No receiver may be in a transfer."""
        if self._pool:
            self._driver.free(self._pool)
            self._pool, self._size = 0, 0


class CudaIpcTarget:
    """Opens its senders' pools and copies into buffers on its own device."""

    name = "cuda_ipc"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._own: Room | None = None

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._own = room.on(self._driver.device, self._own)
        return b""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        assert self._own is not None
        buffers, copied = self._own.all(), 0
        batches: dict[str, list[Batch]] = {}
        for batch in job.received():
            batches.setdefault(name_of(source=True, rank=batch.source), []).append(batch)
        for name, held in batches.items():
            job.check(f"the weights of {name}")
            copied += self._copy(parse_export(endpoints.get(name, b"")), name, held, buffers)
        return Arrived(buffers, copied)

    def finish(self) -> None:
        """Nothing is held open."""

    def _copy(self, export: Export, name: str, batches: list[Batch], buffers: Buffers) -> int:
        """Carry out one sender's batches; how many bytes that were."""
        if export.device not in self._driver.uuids():
            raise TransferError(f"{name} is on GPU {export.device.hex()}, which {self._driver.device} cannot reach")
        pointer, copied = self._driver.open(export.handle), 0
        try:
            found = self._driver.size(pointer)
            if found < export.nbytes:
                raise TransferError(f"{name} announced {export.nbytes} bytes, its pool has {found}")
            pool = self._driver.view(pointer, export.nbytes)
            if bytes(pool[:NONCE_BYTES].tolist()) != export.nonce:
                raise TransferError(f"{name} announced another pool than the one that its handle opens")
            for copy in (copy for batch in batches for copy in batch.copies):
                offset, size = export.buffers.get(copy.source_buffer, (0, 0))
                origin = view(pool[offset : offset + size], copy.source_offset, copy.source_pitch, copy)
                target_view(buffers, copy).copy_(origin)
                copied += copy.nbytes
            self._driver.synchronise()
        finally:
            self._driver.close(pointer)
        return copied


def parse_export(data: bytes) -> Export:
    """Decode what a sender announced. Raises TransferError for anything but a well-formed export."""
    try:
        export = msgspec.msgpack.decode(data, type=Export)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not a cuda_ipc export: {error}") from error
    for name, (offset, size) in export.buffers.items():
        if offset < ALIGNMENT or size < 0 or offset + size > export.nbytes:
            raise TransferError(f"buffer {name!r} at {offset}+{size} is outside the pool of {export.nbytes} bytes")
    return export
