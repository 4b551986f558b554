"""`ipc`: both sides on one host. The sender copies its weights into a memory file that receivers map.

The file has no name and no path: its descriptor is handed over a UNIX socket to whoever knows the attempt's nonce. It
is written in the receivers' form, fused parameters in one run, so a receiver's buffer is a view of the mapping and
nothing is copied there; engines of one form share one copy. Only a buffer that several senders fill is copied at the
receiver. CPU memory only.

A file is written region by region, on all cores. A finished region cannot be written any more (`memory_file.py`); then
its byte at the end of the file says so, and the receivers digest it while the next ones are copied.

Files take turns, so their pages are neither cleared nor mapped anew. One is written again only when nobody serves from
it: every receiver says with each attempt who it is and which files its live version lies in. A file that one of them
names stays as it is, and so does one that was ever given to a process that does not speak up any more.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from zerokl.weightsync.layout import MAX_TENSOR_BYTES, Typed
from zerokl.weightsync.messages import Nonce, name_of
from zerokl.weightsync.plan import Copy, Plan
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import (
    THREADS,
    bytes_at,
    digest,
    move,
    move_and_digest,
    target_view,
    view,
)  # fmt: skip
from zerokl.weightsync.transports.memory_file import PAGE, MemoryFile, map_file

_ACCEPT_S = 0.05
_POLL_S = 0.0005
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid

T = TypeVar("T")

Id = Nonce
"""Of a file, or of a receiving process: random, made once."""


class Holding(Typed, frozen=True):
    """What a receiver announces: its buffers (name -> bytes), and ``held``, the files its live version lies in."""

    attempt: Nonce
    process: Id
    sizes: dict[str, Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSOR_BYTES)]]
    held: tuple[Id, ...]


class Export(Typed, frozen=True):
    """What a sender announces: where its file is to be had."""

    path: Annotated[str, msgspec.Meta(max_length=100)]
    nonce: Nonce


class Region(Typed, frozen=True):
    """Part of the file: a receiver's ``whole`` buffer as it will lie there, or the sender's copies for a buffer that
    others fill too, one after the other. ``index``: its number, and that of its byte in `Arrangement.progress`."""

    index: int
    offset: int
    nbytes: int
    whole: bool
    copies: tuple[Copy, ...]


class Arrangement(NamedTuple):
    """What lies where in a sender's file of ``nbytes``: (target, buffer) -> region; from ``progress`` on, one byte for
    each region, 1 when it is finished."""

    regions: dict[tuple[int, str], Region]
    progress: int
    nbytes: int


class IpcSource:
    """Exports the sender's weights: one copy of each byte, into the file."""

    name = "ipc"

    def __init__(self, folder: Path | None) -> None:
        """``folder``: of this host and user alone, for the socket that hands out the file; None: one of its own."""
        self._own = tempfile.TemporaryDirectory(prefix="zerokl-") if folder is None else None
        self._folder = folder or Path(self._own.name if self._own else "")
        self._socket: socket.socket | None = None
        self._path = self._folder / "none"
        self._nonce = b""
        self._sources: dict[str, np.ndarray] = {}
        self._files: list[MemoryFile] = []

    def prepare(self, job: Job, buffers: Buffers) -> bytes:  # noqa: ARG002
        self.finish()
        self._path = self._folder / f"{secrets.token_hex(8)}.ipc"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(128)
        self._socket.settimeout(_ACCEPT_S)
        self._sources, self._nonce = {name: buffer.numpy() for name, buffer in buffers.items()}, secrets.token_bytes(16)
        return msgspec.msgpack.encode(Export(str(self._path), self._nonce))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        plan = arrange(job.plan, job.rank, endpoints)
        regions = sorted(set(plan.regions.values()), key=lambda region: -region.nbytes)
        if not regions:
            return 0
        file = self._file(plan.nbytes, receivers(endpoints, job.attempt))
        file.bytes[plan.progress :] = 0
        left, waiting = iter(regions), {name_of(source=False, rank=target) for target, _ in plan.regions}
        with ThreadPoolExecutor(THREADS) as pool:  # leaving it waits for the writers, which end with the attempt
            writers = [pool.submit(self._write, job, file, left, plan.progress) for _ in range(THREADS)]
            while waiting:
                job.check(", ".join(sorted(waiting)) + " to fetch the weights")
                for writer in writers:
                    if writer.done():
                        writer.result()
                waiting.discard(self._hand_over(file))
            wait(writers, return_when=FIRST_EXCEPTION)
            for writer in writers:
                writer.result()
        return sum(copy.nbytes for region in regions for copy in region.copies)

    def finish(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)
            self._socket = None
        self._sources = {}

    def new_file(self, nbytes: int) -> MemoryFile:
        """A file of this size. Raises OSError if there is not enough memory."""
        return MemoryFile(nbytes)

    def fill(self, memory: torch.Tensor, region: Region) -> dict[Copy, bytes]:
        """Write every copy of a region to its place in it; returns the digests of what was read."""
        digests, target = {}, memory.numpy()
        for copy, offset, pitch in placed(region):
            source = self._sources[copy.source_buffer]
            here = bytes_at(source, copy.source_offset, copy.source_pitch, copy)
            digests[copy] = move_and_digest(bytes_at(target, offset, pitch, copy), here)
        return digests

    def _file(self, nbytes: int, present: Mapping[str, Holding]) -> MemoryFile:
        """A file that nobody serves from: an earlier one, or else a new one. Raises TransferError if there is no memory
        for it."""
        known = {holding.process for holding in present.values()}
        held = {file for holding in present.values() for file in holding.held}
        free = [f for f in self._files if f.nbytes == nbytes and f.id not in held and f.given <= known][:1]
        self._files = [f for f in self._files if f.id in held] + free  # the others stay with whoever maps them
        if not free:
            try:
                free = [self.new_file(nbytes)]
            except OSError as error:
                raise TransferError(f"cannot export {nbytes} bytes of weights: {error.strerror}") from error
            self._files += free
        free[0].given |= known
        return free[0]

    def _write(self, job: Job, file: MemoryFile, left: Iterator[Region], progress: int) -> None:
        """Write regions until none is left. Runs in several threads, which share the iterator."""
        for region in left:
            job.check("its own copies")
            with file.writable(region.offset, region.nbytes) as memory:
                found = self.fill(memory, region)
            job.digests.update(found)
            file.bytes[progress + region.index] = 1  # nobody sees it before the bytes: a system call lies between

    def _hand_over(self, file: MemoryFile) -> str:
        """Serve one caller, if there is one; returns its name, empty for nobody or a stranger."""
        assert self._socket is not None
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return ""
        with connection:
            connection.settimeout(1.0)
            try:
                found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                asked = connection.recv(256)
                same_user = _CREDENTIALS.unpack(found)[1] == os.getuid()
                if not same_user or not hmac.compare_digest(asked[:16], self._nonce):
                    return ""
                socket.send_fds(connection, [file.id], [file.descriptor])
                return asked[16:].decode(errors="replace")
            except OSError:
                return ""  # it went away; the deadline names it if it stays away


class IpcTarget:
    """Maps what the senders export; copies only what has to lie elsewhere."""

    name = "ipc"

    def __init__(self) -> None:
        self._process = secrets.token_bytes(16)
        self._room = Room({})
        self._mapped: dict[bytes, torch.Tensor] = {}
        self._last: dict[str, bytes] = {}
        """Sender -> the file that it handed over last."""

    def prepare(self, job: Job, room: Room) -> bytes:
        self._room = room
        return msgspec.msgpack.encode(Holding(job.attempt, self._process, room.sizes, tuple(self._live())))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        buffers: dict[str, torch.Tensor] = {}
        digests: dict[Copy, bytes] = {}
        copied = 0
        sources = sorted({batch.source for batch in job.received()})
        names = {name_of(source=True, rank=source) for source in sources}
        self._last = {name: file for name, file in self._last.items() if name in names}
        for source in sources:
            name = name_of(source=True, rank=source)
            plan = arrange(job.plan, source, endpoints)
            memory = self._fetch(job, name, parse_export(endpoints.get(name, b"")), plan.nbytes)
            mine = {buffer: region for (target, buffer), region in plan.regions.items() if target == job.rank}
            for buffer in _finished(job, name, memory[plan.progress :], mine):
                region = mine[buffer]
                data = memory[region.offset : region.offset + region.nbytes]
                if region.whole and not self._room.in_place:
                    buffers[buffer] = data
                    digests |= _digests(data, region)
                else:
                    buffers[buffer] = self._room.get(buffer)
                    copied += _copy(buffers, region, data)
        return Arrived(buffers, copied, digests)

    def finish(self) -> None:
        """Files stay mapped, for the next time that it is their turn."""

    def _live(self) -> dict[bytes, torch.Tensor]:
        """The mapped files that a live buffer lies in."""
        places = [buffer.data_ptr() for buffer in self._room.live.values()]
        spans = {file: range(x.data_ptr(), x.data_ptr() + x.numel()) for file, x in self._mapped.items()}
        return {file: self._mapped[file] for file, span in spans.items() if any(p in span for p in places)}

    def _fetch(self, job: Job, name: str, export: Export, nbytes: int) -> torch.Tensor:
        """A sender's file of ``nbytes``, mapped."""
        while True:
            job.check(f"{name} to hand over its weights")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ACCEPT_S)
                try:
                    connection.connect(export.path)
                    connection.sendall(export.nonce + name_of(source=False, rank=job.rank).encode())
                    while True:
                        job.check(f"{name} to hand over its weights")
                        try:
                            file, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
                            break
                        except TimeoutError:
                            continue
                except TimeoutError:
                    continue
                except OSError as error:
                    raise TransferError(f"{name} does not hand over its weights: {error}") from error
            if len(file) != 16 or len(descriptors) != 1:
                raise TransferError(f"{name} refused to hand over its weights")
            return self._map(file, descriptors[0], nbytes, name)

    def _map(self, file: bytes, descriptor: int, nbytes: int, name: str) -> torch.Tensor:
        self._last[name] = file
        if file not in self._mapped:
            memory = map_file(descriptor, nbytes, name)
            known = {last: self._mapped[last] for last in self._last.values() if last in self._mapped}
            # every file that may become live, from every sender; others are of senders or sizes that are gone
            self._mapped = self._live() | known | {file: memory}
        else:
            os.close(descriptor)
        if self._mapped[file].numel() != nbytes:
            raise TransferError(f"{name} handed over {self._mapped[file].numel()} bytes, the plan has {nbytes}")
        return self._mapped[file]


def _finished(job: Job, name: str, progress: torch.Tensor, regions: Mapping[str, Region]) -> Iterator[str]:
    """Buffers, each as soon as its region is finished."""
    names, places = list(regions), np.array([region.index for region in regions.values()])
    taken = np.zeros(len(names), np.uint8)
    while not taken.all():
        job.check(f"{name} to copy its weights")
        found = np.flatnonzero(progress.numpy()[places] > taken)
        taken[found] = 1
        for index in found:
            yield names[index]
        if not found.size:
            job.cancelled.wait(_POLL_S)


def _digests(data: torch.Tensor, region: Region) -> dict[Copy, bytes]:
    memory = data.numpy()
    return {copy: digest(bytes_at(memory, offset, pitch, copy)) for copy, offset, pitch in placed(region)}


def _copy(buffers: Buffers, region: Region, data: torch.Tensor) -> int:
    """Copy a region to where it has to lie; how many bytes."""
    for copy, offset, pitch in placed(region):
        move(target_view(buffers, copy), view(data, offset, pitch, copy))
    return sum(copy.nbytes for copy in region.copies)


def arrange(plan: Plan, source: int, endpoints: Mapping[str, bytes]) -> Arrangement:
    """What lies where in a sender's file. Both sides compute it, from the plan and from the sizes that the receivers
    announced. Raises TransferError where those do not fit the plan."""
    copies: dict[tuple[int, str], list[Copy]] = {}
    senders: dict[tuple[int, str], set[int]] = {}
    for batch in plan.batches:
        for copy in batch.copies:
            place = batch.target, copy.target_buffer
            senders.setdefault(place, set()).add(batch.source)
            if batch.source == source:
                copies.setdefault(place, []).append(copy)
    announced = {target: parse_holding(endpoints, target).sizes for target in {target for target, _ in copies}}
    known: dict[tuple[int, tuple[Copy, ...]], Region] = {}
    regions, end = {}, 0
    for (target, buffer), parts in copies.items():
        whole = len(senders[target, buffer]) == 1
        extent = max(c.target_offset + (c.rows - 1) * c.target_pitch + c.row_bytes for c in parts)
        size = announced[target].get(buffer, 0) if whole else sum(copy.nbytes for copy in parts)
        if whole and size < extent:
            raise TransferError(f"{name_of(source=False, rank=target)} has {size} bytes in {buffer!r}, not {extent}")
        key = size if whole else -1, tuple(parts)
        if key not in known:
            known[key] = Region(len(known), end, size, whole, key[1])
            end += _pages(size)
        regions[target, buffer] = known[key]
    return Arrangement(regions, end, end + _pages(len(known)))


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def placed(region: Region) -> Iterator[tuple[Copy, int, int]]:
    """Every copy of a region with the offset of its first byte in it, and the bytes from row to row."""
    end = 0
    for copy in region.copies:
        yield (copy, copy.target_offset, copy.target_pitch) if region.whole else (copy, end, copy.row_bytes)
        end += copy.nbytes


def parse_export(data: bytes) -> Export:
    """Decode what a sender announced. Raises TransferError for anything but a well-formed export."""
    return _parse(data, Export)


def parse_holding(endpoints: Mapping[str, bytes], target: int) -> Holding:
    """Decode what a receiver announced. Raises TransferError for anything else."""
    return _parse(endpoints.get(name_of(source=False, rank=target), b""), Holding)


def receivers(endpoints: Mapping[str, bytes], attempt: bytes) -> dict[str, Holding]:
    """What all receivers announced, by name. Raises TransferError for what was said in another attempt: a file that was
    free then may be served now."""
    found = {name: _parse(data, Holding) for name, data in endpoints.items() if name.startswith("rollout-")}
    for name, holding in found.items():
        if holding.attempt != attempt:
            raise TransferError(f"{name} announced what it holds in another attempt")
    return found


def _parse(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not an ipc endpoint: {error}") from error


_KNOWN = [msgspec.msgpack.Decoder(kind) for kind in (Export, Holding)]  # before threads decode them (`messages`)
