"""`ipc`: both sides on one host. The sender exports its weights in one sealed memory file; receivers map it.

The file has no name and no path: its descriptor is handed over a UNIX socket to whoever knows the attempt's nonce. It
is sealed before that: neither its size nor its bytes can change any more, so what was verified is what is served. It is
written in the receivers' form, fused parameters in one run, so a receiver's buffer is a view of the mapping and
nothing is copied there; engines of one form share one copy. Only a buffer that several senders fill is copied at the
receiver. CPU memory only.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import torch

from zerokl.weightsync.digest import tensor_bytes
from zerokl.weightsync.layout import MAX_TENSOR_BYTES, Typed
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Copy, Plan
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import move, source_view, target_view

ALIGNMENT = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_POLL_S = 0.05
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid

T = TypeVar("T")

Sizes = dict[str, Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSOR_BYTES)]]
"""What a receiver announces: its buffers (name -> bytes)."""


class Export(Typed, frozen=True):
    """What a sender announces: where its file is to be had."""

    path: Annotated[str, msgspec.Meta(max_length=100)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Region(Typed, frozen=True):
    """Part of the file: a receiver's ``whole`` buffer as it will lie there, or the sender's copies for a buffer that
    others fill too, one after the other."""

    offset: int
    nbytes: int
    whole: bool
    copies: tuple[Copy, ...]


class IpcSource:
    """Exports the sender's weights: one copy of each byte, into the file."""

    name = "ipc"

    def __init__(self, folder: Path) -> None:
        """``folder``: of this user alone, for the socket that hands out the file."""
        self._folder = folder
        self._socket: socket.socket | None = None
        self._path = folder / "none"
        self._nonce = b""
        self._buffers: Buffers = {}

    def prepare(self, job: Job, buffers: Buffers) -> bytes:  # noqa: ARG002
        self.finish()
        self._path = self._folder / f"{secrets.token_hex(8)}.ipc"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(128)
        self._socket.settimeout(_POLL_S)
        self._buffers, self._nonce = buffers, secrets.token_bytes(16)
        return msgspec.msgpack.encode(Export(str(self._path), self._nonce))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        regions, nbytes = arrange(job.plan, job.rank, endpoints)
        waiting = {name_of(source=False, rank=target) for target, _ in regions}
        file = self._write(set(regions.values()), nbytes)
        try:
            while waiting:
                job.check(", ".join(sorted(waiting)) + " to fetch the weights")
                name = self._hand_over(file)
                waiting.discard(name)
        finally:
            os.close(file)
        return sum(copy.nbytes for region in set(regions.values()) for copy in region.copies)

    def finish(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)
            self._socket = None
        self._buffers = {}

    def _write(self, regions: set[Region], nbytes: int) -> int:
        """A sealed memory file with these regions; returns its descriptor.

        Plain writes: full memory is an error then, not a signal. Raises TransferError if there is not enough.
        """
        file = os.memfd_create("zerokl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, nbytes)
            self.fill(file, sorted(regions, key=lambda region: region.offset))
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(file)
            raise TransferError(f"cannot export {nbytes} bytes of weights: {error.strerror}") from error
        except BaseException:
            os.close(file)
            raise
        return file

    def fill(self, file: int, regions: Sequence[Region]) -> None:
        """Write every copy of the regions to its place in the file."""
        for region in regions:
            for copy, offset, pitch in placed(region):
                _put(file, region.offset + offset, pitch, source_view(self._buffers, copy))

    def _hand_over(self, file: int) -> str:
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
                socket.send_fds(connection, [b"weights"], [file])
                return asked[16:].decode(errors="replace")
            except OSError:
                return ""  # it went away; the deadline names it if it stays away


class IpcTarget:
    """Maps what the senders export; copies only what has to lie elsewhere."""

    name = "ipc"

    def __init__(self) -> None:
        self._room = Room({})

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._room = room
        return msgspec.msgpack.encode(room.sizes)

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        buffers: dict[str, torch.Tensor] = {}
        copied = 0
        for source in sorted({batch.source for batch in job.received()}):
            name = name_of(source=True, rank=source)
            regions, nbytes = arrange(job.plan, source, endpoints)
            exported = self._fetch(job, name, parse_export(endpoints.get(name, b"")), nbytes)
            for (target, buffer), region in regions.items():
                if target != job.rank:
                    continue
                data = exported[region.offset : region.offset + region.nbytes]
                if region.whole and not self._room.in_place:
                    buffers[buffer] = data
                    continue
                job.check("the rest of the copies")
                buffers[buffer] = self._room.get(buffer)
                for copy, offset, pitch in placed(region):
                    shape, strides = (copy.rows, copy.row_bytes), (pitch, 1)
                    move(target_view(buffers, copy), data.as_strided(shape, strides, data.storage_offset() + offset))
                    copied += copy.nbytes
        return Arrived(buffers, copied)

    def finish(self) -> None:
        """Nothing is held: mappings live as long as the tensors that view them."""

    def _fetch(self, job: Job, name: str, export: Export, nbytes: int) -> torch.Tensor:
        """A sender's file of ``nbytes``, mapped."""
        while True:
            job.check(f"{name} to hand over its weights")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_POLL_S)
                try:
                    connection.connect(export.path)
                    connection.sendall(export.nonce + name_of(source=False, rank=job.rank).encode())
                    while True:
                        job.check(f"{name} to hand over its weights")
                        try:
                            said, files, _, _ = socket.recv_fds(connection, 16, 1)
                            break
                        except TimeoutError:
                            continue
                except TimeoutError:
                    continue
                except OSError as error:
                    raise TransferError(f"{name} does not hand over its weights: {error}") from error
            if said != b"weights" or len(files) != 1:
                raise TransferError(f"{name} refused to hand over its weights")
            return map_export(files[0], nbytes, name)


def arrange(plan: Plan, source: int, endpoints: Mapping[str, bytes]) -> tuple[dict[tuple[int, str], Region], int]:
    """What lies where in a sender's file, and its size: (target, buffer) -> region. Both sides compute it, from the
    plan and from the sizes that the receivers announced. Raises TransferError where those do not fit the plan."""
    copies: dict[tuple[int, str], list[Copy]] = {}
    senders: dict[tuple[int, str], set[int]] = {}
    for batch in plan.batches:
        for copy in batch.copies:
            place = batch.target, copy.target_buffer
            senders.setdefault(place, set()).add(batch.source)
            if batch.source == source:
                copies.setdefault(place, []).append(copy)
    announced = {target: parse_sizes(endpoints, target) for target in {target for target, _ in copies}}
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
            known[key] = Region(end, size, whole, key[1])
            end += -(-size // ALIGNMENT) * ALIGNMENT
        regions[target, buffer] = known[key]
    return regions, end


def placed(region: Region) -> Iterator[tuple[Copy, int, int]]:
    """Every copy of a region with the offset of its first byte in it, and the bytes from row to row."""
    end = 0
    for copy in region.copies:
        yield (copy, copy.target_offset, copy.target_pitch) if region.whole else (copy, end, copy.row_bytes)
        end += copy.nbytes


def parse_export(data: bytes) -> Export:
    """Decode what a sender announced. Raises TransferError for anything but a well-formed export."""
    return _parse(data, Export)


def parse_sizes(endpoints: Mapping[str, bytes], target: int) -> Sizes:
    """Decode what a receiver announced. Raises TransferError for anything but names and sizes."""
    return _parse(endpoints.get(name_of(source=False, rank=target), b""), Sizes)


def _parse(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not an ipc endpoint: {error}") from error


def map_export(file: int, nbytes: int, name: str) -> torch.Tensor:
    """Map a file, uint8 [nbytes], and close its descriptor. Raises TransferError unless it has that size and is
    sealed."""
    try:
        size = os.fstat(file).st_size
        if size != nbytes:
            raise TransferError(f"{name} handed over {size} bytes, the plan has {nbytes}")
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TransferError(f"{name} handed over memory that it can still change")
        # private: torch wants writable memory, and nothing written here could reach the file
        memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise TransferError(f"{name} handed over no memory file: {error}") from error
    finally:
        os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _put(file: int, offset: int, pitch: int, rows: torch.Tensor) -> None:
    """Write uint8 [rows, row_bytes], its rows ``pitch`` bytes apart."""
    if pitch == rows.shape[1] or len(rows) == 1:
        _write(file, offset, rows)
        return
    for index, row in enumerate(rows):
        _write(file, offset + index * pitch, row)


def _write(file: int, offset: int, data: torch.Tensor) -> None:
    left = tensor_bytes(data.contiguous())
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
