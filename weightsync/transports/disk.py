"""`disk`: for engines elsewhere that share a folder with the trainer.

Each sending rank writes one safetensors file per version and then, by an atomic rename, a manifest with its digest.
Most versions hold only what changed since the one before; the manifest names the chain back to the last complete one.
A receiver applies the part of the chain that it does not hold yet.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from zerokl.weightsync.digest import tensor_bytes
from zerokl.weightsync.layout import Typed
from zerokl.weightsync.messages import HexDigest, Version, name_of
from zerokl.weightsync.plan import Copy
from zerokl.weightsync.transports import delta
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError
from zerokl.weightsync.transports.copies import move, target_view, view

_POLL_S = 0.01
_MAX_MANIFEST = 16 << 20
_GAPS, _VALUES = "gaps:", "values:"
_LINK_PATTERN = "^[0-9a-f]{32}$"

Link = Annotated[str, msgspec.Meta(pattern=_LINK_PATTERN)]
"""One version in the folder: the attempt that wrote it, in hex."""


class Manifest(Typed, frozen=True):
    """What one rank wrote. ``chain``: from the last complete version to this one; one link means this is complete."""

    version: Version
    chain: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=1024)]
    buffers: dict[str, int]
    file_digest: HexDigest


class DiskSource:
    """Writes versions below ``folder``. Every ``complete_every``-th is complete, and so is one of which the fraction
    ``delta_below`` or more has changed: its changes would take no less room. The others are deltas."""

    name = "disk"

    def __init__(self, folder: Path, *, complete_every: int = 8, delta_below: float = 0.25) -> None:
        self._folder, self._complete_every, self._delta_below = folder, complete_every, delta_below
        self._chain: tuple[str, ...] = ()
        self._last: dict[str, torch.Tensor] = {}
        self._buffers: Buffers = {}
        self._stale: list[str] = []
        self._rank = 0

    def prepare(self, job: Job, buffers: Buffers) -> bytes:
        self._rank = job.rank
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = dict.fromkeys(copy.source_buffer for batch in job.sent() for copy in batch.copies)
        self._buffers = {name: buffers[name] for name in names}
        return str(self._folder.resolve()).encode()

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:  # noqa: ARG002  (receivers read the folder)
        link, sizes = job.attempt.hex(), {name: buffer.numel() for name, buffer in self._buffers.items()}
        fits = {name: buffer.numel() for name, buffer in self._last.items()} == sizes
        complete = not fits or len(self._chain) >= self._complete_every or self._changed() >= self._delta_below
        if complete:
            self._stale, self._chain = list(self._chain), ()
        try:
            written, digest = self._write(link, job.rank, complete=complete)
            self._chain = (*self._chain, link)
            manifest = Manifest(job.version, self._chain, sizes, digest)
            path = manifest_path(self._folder, link, job.rank)
            path.with_suffix(".new").write_bytes(msgspec.json.encode(manifest))
            path.with_suffix(".new").rename(path)
        except OSError as error:
            self._chain, self._last = (), {}
            raise TransferError(f"cannot write weights to {self._folder}: {error.strerror}") from error
        for name, buffer in self._buffers.items():
            move(self._last.setdefault(name, torch.empty_like(buffer)), buffer)
        return written

    def finish(self) -> None:
        for link in self._stale:
            _remove(self._folder, link, self._rank)
        self._stale, self._buffers = [], {}

    def _changed(self) -> float:
        """Which fraction of the bytes differs from the last version."""
        changed = sum(int((self._last[name] != buffer).sum()) for name, buffer in self._buffers.items())
        return changed / max(1, sum(buffer.numel() for buffer in self._buffers.values()))

    def _write(self, link: str, rank: int, *, complete: bool) -> tuple[int, str]:
        """One rank's file of a version; its bytes and digest."""
        (self._folder / link).mkdir(mode=0o700, exist_ok=True)
        tensors = dict(self._buffers)
        if not complete:
            tensors = {}
            for name, buffer in self._buffers.items():
                for kind, data in zip((_GAPS, _VALUES), delta.encode(self._last[name], buffer), strict=True):
                    tensors[kind + name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        path = shard_path(self._folder, link, rank)
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise OSError(0, str(error), str(path)) from error
        written = path.read_bytes()
        return len(written), xxhash.xxh3_128_hexdigest(written)


class DiskTarget:
    """Reads what its senders wrote into its own buffers."""

    name = "disk"

    def __init__(self) -> None:
        self._room = Room({})
        self._held: dict[int, str] = {}
        self._arrived: Buffers | None = None

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._room = room
        if self._arrived is None or room.live is not self._arrived:  # what was read last did not become live
            self._held = {}
        return b""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        copies: dict[int, list[Copy]] = {}
        for batch in job.received():
            copies.setdefault(batch.source, []).extend(batch.copies)
        buffers, live = self._room.all(), self._room.live
        held, copied, links = self._held, 0, {}
        self._held = {}
        for source, parts in copies.items():
            name = name_of(source=True, rank=source)
            folder = Path(os.fsdecode(endpoints.get(name, b"")))
            manifest = self._wait(job, folder, source)
            chain = list(manifest.chain)
            if held.get(source) in chain:
                chain = chain[chain.index(held[source]) + 1 :]
                for copy in parts if live is not buffers and not self._room.in_place else ():
                    move(target_view(buffers, copy), target_view(live, copy))
                    copied += copy.nbytes
            for link in chain:
                job.check(f"the weights of {name}")
                copied += _read(folder, link, source, parts, buffers)
            links[source] = manifest.chain[-1]
        self._held, self._arrived = links, buffers
        return Arrived(buffers, copied)

    def finish(self) -> None:
        """Nothing is held open."""

    def _wait(self, job: Job, folder: Path, source: int) -> Manifest:
        path = manifest_path(folder, job.attempt.hex(), source)
        while not path.exists():
            job.check(f"trainer-{source} to write {path.name}")
            job.cancelled.wait(_POLL_S)
        manifest = read_manifest(path)
        if manifest.version != job.version or manifest.chain[-1] != job.attempt.hex():
            raise TransferError(f"{path} is of version {manifest.version!r}, not of {job.version!r}")
        return manifest


def _remove(folder: Path, link: str, rank: int) -> None:
    """Take back what one rank wrote for a version. What others wrote stays: their chains may still go through it."""
    with contextlib.suppress(OSError):
        for path in (manifest_path(folder, link, rank), shard_path(folder, link, rank)):
            path.unlink(missing_ok=True)
        (folder / link).rmdir()  # the last one does it


def manifest_path(folder: Path, link: str, rank: int) -> Path:
    return folder / link / f"trainer-{rank}.json"


def shard_path(folder: Path, link: str, rank: int) -> Path:
    return folder / link / f"trainer-{rank}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """Decode a manifest. Raises TransferError, naming the file, for anything but a well-formed one."""
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise TransferError(f"{path} has more than {_MAX_MANIFEST} bytes")
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"{path} is no manifest of weights: {error}") from error


def read_shard(folder: Path, link: str, source: int) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """One rank's file of one version. Raises TransferError, naming it, if it is absent or not what was written."""
    manifest, path = read_manifest(manifest_path(folder, link, source)), shard_path(folder, link, source)
    try:
        data = path.read_bytes()
        if xxhash.xxh3_128_hexdigest(data) != manifest.file_digest:
            raise TransferError(f"{path} is damaged: its digest is not the one in its manifest")
        return manifest, load(data)
    except (OSError, SafetensorError) as error:
        raise TransferError(f"cannot read {path}: {error}") from error


def _read(folder: Path, link: str, source: int, copies: list[Copy], buffers: Buffers) -> int:
    """Apply one version of one sender to the buffers; how many bytes were written."""
    manifest, tensors = read_shard(folder, link, source)
    if len(manifest.chain) == 1:
        written = 0
        for copy in copies:
            if copy.source_buffer not in tensors:
                raise TransferError(f"trainer-{source} did not write {copy.source_buffer!r} in {link}")
            origin = view(tensors[copy.source_buffer], copy.source_offset, copy.source_pitch, copy)
            move(target_view(buffers, copy), origin)
            written += copy.nbytes
        return written
    return sum(_changes(manifest, tensors, copies, buffers))


def _changes(
    manifest: Manifest, tensors: Mapping[str, torch.Tensor], copies: list[Copy], buffers: Buffers
) -> Iterator[int]:
    decoded = {}
    for copy in copies:
        name = copy.source_buffer
        if name not in decoded:
            if _GAPS + name not in tensors or _VALUES + name not in tensors or name not in manifest.buffers:
                raise TransferError(f"no changes of {name!r} in {manifest.chain[-1]}")
            gaps, values = (bytes(tensor_bytes(tensors[kind + name])) for kind in (_GAPS, _VALUES))
            decoded[name] = delta.decode(gaps, values, manifest.buffers[name])
        yield delta.apply(copy, buffers[copy.target_buffer], *decoded[name])
