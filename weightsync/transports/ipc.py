"""`ipc`: both sides on one host. The sender exports its buffers in one sealed memory file; receivers map it.

The file has no name and no path: its descriptor is handed over a UNIX socket to whoever knows the attempt's nonce. It
is sealed before that: neither its size nor its bytes can change any more, so what was verified is what is served. Where
a receiver's buffer is a run of the sender's it becomes a view of the mapping and nothing is copied at the receiver.
CPU memory only.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from zerokl.weightsync.digest import tensor_bytes
from zerokl.weightsync.layout import Typed
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Batch
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import move, target_view, view

ALIGNMENT = 4096
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_POLL_S = 0.05
_CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: pid, uid, gid


class Export(Typed, frozen=True):
    """Where a sender's file is to be had, and what lies where in it (buffer -> offset, bytes)."""

    path: Annotated[str, msgspec.Meta(max_length=100)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    nbytes: int
    buffers: dict[str, tuple[int, int]]


class IpcSource:
    """Exports the sender's buffers: one copy of each, into the file."""

    name = "ipc"

    def __init__(self, folder: Path) -> None:
        """``folder``: of this user alone, for the socket that hands out the file."""
        self._folder = folder
        self._socket: socket.socket | None = None
        self._path = folder / "none"
        self._export = Export("", bytes(16), 0, {})
        self._buffers: Buffers = {}

    def prepare(self, job: Job, buffers: Buffers) -> bytes:
        self.finish()
        offset, places = 0, {}
        for name in dict.fromkeys(copy.source_buffer for batch in job.sent() for copy in batch.copies):
            places[name] = offset, buffers[name].numel()
            offset += -(-buffers[name].numel() // ALIGNMENT) * ALIGNMENT
        self._path = self._folder / f"{secrets.token_hex(8)}.ipc"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(128)
        self._socket.settimeout(_POLL_S)
        self._buffers = buffers
        self._export = Export(str(self._path), secrets.token_bytes(16), offset, places)
        return msgspec.msgpack.encode(self._export)

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:  # noqa: ARG002  (receivers come here)
        waiting = {name_of(source=False, rank=batch.target) for batch in job.sent()}
        file = _write(self._export, self._buffers)
        try:
            while waiting:
                job.check(", ".join(sorted(waiting)) + " to fetch the weights")
                name = self._hand_over(file)
                waiting.discard(name)
        finally:
            os.close(file)
        return sum(size for _, size in self._export.buffers.values())

    def finish(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._path.unlink(missing_ok=True)
            self._socket = None
        self._buffers = {}

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
                if not same_user or not hmac.compare_digest(asked[:16], self._export.nonce):
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
        return b""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        batches: dict[int, list[Batch]] = {}
        for batch in job.received():
            batches.setdefault(batch.source, []).append(batch)
        exported = {}
        for source in batches:
            name = name_of(source=True, rank=source)
            exported[source] = self._fetch(job, name, parse_export(endpoints.get(name, b"")))
        buffers = {} if self._room.in_place else self._views(batches, exported)
        ready, copied = set(buffers), 0
        for source, parts in batches.items():
            for copy in (copy for batch in parts for copy in batch.copies):
                if copy.target_buffer in ready:
                    continue
                job.check("the rest of the copies")
                if copy.target_buffer not in buffers:
                    buffers[copy.target_buffer] = self._room.get(copy.target_buffer)
                origin = exported[source].get(copy.source_buffer)
                if origin is None:
                    raise TransferError(f"trainer-{source} did not export {copy.source_buffer!r}")
                move(target_view(buffers, copy), view(origin, copy.source_offset, copy.source_pitch, copy))
                copied += copy.nbytes
        return Arrived(buffers, copied)

    def finish(self) -> None:
        """Nothing is held: mappings live as long as the tensors that view them."""

    def _views(
        self, batches: Mapping[int, list[Batch]], exported: Mapping[int, Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The buffers that are one run of bytes at one sender: views of its file."""
        parts: dict[str, list[tuple[int, int, int, str, int]]] = {}
        for source, held in batches.items():
            for c in (copy for batch in held for copy in batch.copies):
                run = c.target_offset, c.nbytes if c.rows == 1 else 0, source, c.source_buffer, c.source_offset
                parts.setdefault(c.target_buffer, []).append(run)
        found = {}
        for name, runs in parts.items():
            start, end = min(runs)[4], 0
            whole = True
            for offset, size, source, buffer, at in sorted(runs):
                whole &= size > 0 and offset == end and at == start + end and (source, buffer) == min(runs)[2:4]
                end = offset + size
            if whole and end == self._room.sizes[name]:
                _, _, source, buffer, at = min(runs)
                origin = exported[source].get(buffer)
                if origin is not None and at + end <= origin.numel():
                    found[name] = origin[at : at + end]
        return found

    def _fetch(self, job: Job, name: str, export: Export) -> dict[str, torch.Tensor]:
        """A sender's buffers, mapped."""
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
            return map_export(files[0], export, name)


def parse_export(data: bytes) -> Export:
    """Decode what a sender announced. Raises TransferError for anything but a well-formed export."""
    try:
        export = msgspec.msgpack.decode(data, type=Export)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not an ipc export: {error}") from error
    for name, (offset, size) in export.buffers.items():
        if offset < 0 or size < 0 or offset + size > export.nbytes:
            raise TransferError(f"buffer {name!r} at {offset}+{size} is outside the export of {export.nbytes} bytes")
    return export


def map_export(file: int, export: Export, name: str) -> dict[str, torch.Tensor]:
    """Map a file and close its descriptor. Raises TransferError unless it has the announced size and is sealed."""
    try:
        size = os.fstat(file).st_size
        if size != export.nbytes:
            raise TransferError(f"{name} handed over {size} bytes, announced were {export.nbytes}")
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TransferError(f"{name} handed over memory that it can still change")
        # private: torch wants writable memory, and nothing written here could reach the file
        memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise TransferError(f"{name} handed over no memory file: {error}") from error
    finally:
        os.close(file)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {buffer: whole[offset : offset + size] for buffer, (offset, size) in export.buffers.items()}


def _write(export: Export, buffers: Buffers) -> int:
    """A sealed memory file with the buffers in it. Plain writes: full memory is an error then, not a signal."""
    file = os.memfd_create("zerokl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, export.nbytes)
        for name, (offset, size) in export.buffers.items():
            data = tensor_bytes(buffers[name])
            done = 0
            while done < size:
                done += os.pwrite(file, data[done:], offset + done)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(file)
        raise TransferError(f"cannot export {export.nbytes} bytes of weights: {error.strerror}") from error
    return file
