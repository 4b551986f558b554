"""`ipc`: both sides on one host. The sender's weights are in a memory file that receivers map.

The file has no name and no path: its descriptor is handed over a UNIX socket to whoever knows the attempt's nonce. The
sender copies its weights there in the receivers' form, fused parameters in one run, so a receiver's buffer is a view of
the mapping and nothing is copied there; engines of one form share one copy. Only a buffer that several senders fill is
copied at the receiver. CPU memory only.

A sender that asks (`next_buffers`) gets memory in a file to write its next version into. What lies there as a receiver
wants it is never copied at all: trainer and engine read the same bytes, and the trainer's next update goes elsewhere.

A file is written region by region, on all cores. A finished region cannot be written any more (`memory_file.py`); then
its byte at the end of the file says so, and the receivers digest it while the next ones are copied.

Files take turns, so their pages are neither cleared nor mapped anew. One is written again only when nobody serves from
it: every receiver says with each attempt who it is and which files its live version lies in. A file that one of them
names stays as it is, and so does one that was ever given to a process that does not speak up any more.
"""

from __future__ import annotations

import functools
import hmac
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from zerokl.weightsync.messages import name_of
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
from zerokl.weightsync.transports.ipc_layout import (
    Export,
    Holding,
    Own,
    Region,
    arrange,
    parse_export,
    placed,
    receivers,
)
from zerokl.weightsync.transports.memory_file import MemoryFile, map_file

_ACCEPT_S = 0.05
_POLL_S = 0.0005
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid


class _Mine(NamedTuple):
    """The file that the sender's own buffers lie in, at its beginning."""

    file: MemoryFile
    own: Own
    buffers: Buffers

    def holds(self, buffers: Buffers) -> bool:
        """Whether these are they."""
        return buffers.keys() == self.buffers.keys() and all(
            buffer.data_ptr() == self.buffers[name].data_ptr() for name, buffer in buffers.items()
        )


class _Sent(NamedTuple):
    """The last transfer: from which file, and which processes it was meant for."""

    plan: Plan
    rank: int
    endpoints: Mapping[str, bytes]
    file: MemoryFile
    present: set[bytes]


class IpcSource:
    """Exports the sender's weights: at most one copy of each byte, into the file."""

    name = "ipc"

    def __init__(self, folder: Path | None) -> None:
        """``folder``: of this host and user alone, for the socket that hands out the file; None: one of its own."""
        self._temporary = tempfile.TemporaryDirectory(prefix="zerokl-") if folder is None else None
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._socket: socket.socket | None = None
        self._path = self._folder / "none"
        self._nonce = b""
        self._sources: dict[str, np.ndarray] = {}
        self._sizes: dict[str, int] = {}
        self._files: list[MemoryFile] = []
        self._mine: _Mine | None = None
        self._sent: _Sent | None = None
        self._served: MemoryFile | None = None

    def prepare(self, job: Job, buffers: Buffers) -> bytes:  # noqa: ARG002
        self.finish()
        self._path = self._folder / f"{secrets.token_hex(8)}.ipc"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(128)
        self._socket.settimeout(_ACCEPT_S)
        self._sources, self._nonce = {name: buffer.numpy() for name, buffer in buffers.items()}, secrets.token_bytes(16)
        self._sizes = {name: buffer.numel() for name, buffer in buffers.items()}
        if self._mine is not None and not self._mine.holds(buffers):
            self._leave(self._mine.file)
        own = self._mine.own if self._mine else Own({}, 0)
        return msgspec.msgpack.encode(Export(str(self._path), self._nonce, own))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        plan = arrange(job.plan, job.rank, endpoints)
        if not plan.regions:
            return 0
        present = receivers(endpoints, job.attempt)
        file = self._file(plan.nbytes, present)
        self._sent = _Sent(job.plan, job.rank, endpoints, file, {holding.process for holding in present.values()})
        # sent again without an update in between: somebody may serve from it, and what they serve was verified
        finished = any(file.id in holding.held for holding in present.values())
        regions = sorted(set(plan.regions.values()), key=_turn)
        if not finished:
            file.bytes[plan.progress :] = 0
        left, waiting = iter(regions), {name_of(source=False, rank=target) for target, _ in plan.regions}
        write = functools.partial(self._write, job, file, left, plan.progress, finished=finished)
        with ThreadPoolExecutor(THREADS) as pool:  # leaving it waits for the writers, which end with the attempt
            writers = [pool.submit(write) for _ in range(THREADS)]
            while waiting:
                job.check(", ".join(sorted(waiting)) + " to fetch the weights")
                for writer in writers:
                    if writer.done():
                        writer.result()
                waiting.discard(self._hand_over(file))
            wait(writers, return_when=FIRST_EXCEPTION)
            for writer in writers:
                writer.result()
        return sum(copy.nbytes for region in regions if not region.there for copy in region.copies) * (not finished)

    def finish(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)
            self._socket = None
        self._sources = {}

    def next_buffers(self, *, committed: bool) -> Buffers | None:
        """Memory for the next version, in buffers of the sizes of those sent last; None before anything was sent.
        Nobody serves from it before it is sent itself. ``committed``: whether the last transfer was; then everybody
        serves from its file, and an older one may be free. Raises TransferError if there is no memory for it."""
        sent = self._sent
        if sent is None:
            return None
        own = Own.of(self._sizes)
        nbytes = arrange(sent.plan, sent.rank, sent.endpoints, own).nbytes
        elsewhere = sent.present if committed else set()
        free = [f for f in self._files if f.nbytes == nbytes and f is not sent.file and f.given <= elsewhere]
        file = free[0] if free else self._new(nbytes)
        self._served = sent.file if committed else self._served
        self._files = [f for f in (self._served, file) if f is not None]  # one of a failed attempt is let go
        file.protect(0, own.nbytes, writable=True)
        self._mine = _Mine(file, own, {name: file.bytes[at : at + n] for name, (at, n) in own.buffers.items()})
        return self._mine.buffers

    def new_file(self, nbytes: int) -> MemoryFile:
        """A file of this size. Raises OSError if there is not enough memory."""
        return MemoryFile(nbytes)

    def fill(self, memory: torch.Tensor, region: Region) -> dict[Copy, bytes]:
        """Write every copy of a region to its place in it; returns the digests of what was read."""
        digests, target = {}, memory.numpy()
        for copy, offset, pitch in placed(region):
            digests[copy] = move_and_digest(bytes_at(target, offset, pitch, copy), self._source(copy))
        return digests

    def _source(self, copy: Copy) -> np.ndarray:
        return bytes_at(self._sources[copy.source_buffer], copy.source_offset, copy.source_pitch, copy)

    def _file(self, nbytes: int, present: Mapping[str, Holding]) -> MemoryFile:
        """The file that the sender's buffers lie in; or one that nobody serves from, an earlier or a new one. Raises
        TransferError if there is no memory for it."""
        known = {holding.process for holding in present.values()}
        held = {file for holding in present.values() for file in holding.held}
        if self._mine is not None:
            file = self._mine.file
            if file.nbytes != nbytes:
                self._leave(file)  # the next attempt copies
                raise TransferError(f"receivers want {nbytes} bytes now, the file made for them has {file.nbytes}")
        else:
            free = [f for f in self._files if f.nbytes == nbytes and f.id not in held and f.given <= known][:1]
            file = free[0] if free else self._new(nbytes)
            self._files = [f for f in self._files if f.id in held] + [file]  # the others stay with whoever maps them
        file.given |= known
        return file

    def _leave(self, file: MemoryFile) -> None:
        """Never write this file again: it may be the sender's only copy of its weights."""
        self._mine, self._files = None, [f for f in self._files if f is not file]

    def _new(self, nbytes: int) -> MemoryFile:
        try:
            return self.new_file(nbytes)
        except OSError as error:
            raise TransferError(f"cannot export {nbytes} bytes of weights: {error.strerror}") from error

    def _write(self, job: Job, file: MemoryFile, left: Iterator[Region], progress: int, *, finished: bool) -> None:
        """Write regions until none is left, or only digest what is finished. Runs in several threads, which share the
        iterator."""
        for region in left:
            job.check("its own copies")
            if region.there or finished:
                file.freeze(region.offset, region.nbytes)
                file.bytes[progress + region.index] = 1
                job.digests.update({copy: digest(self._source(copy)) for copy in region.copies})
                continue
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


def _turn(region: Region) -> int:
    """Large ones first: the small ones fill what time is left to each thread."""
    return -region.nbytes


def _finished(job: Job, name: str, progress: torch.Tensor, regions: Mapping[str, Region]) -> Iterator[str]:
    """Buffers, each as soon as its region is finished."""
    names = sorted(regions, key=lambda name: _turn(regions[name]))  # the sender's order: what it reads, too, is cached
    places = np.array([regions[name].index for name in names])
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
