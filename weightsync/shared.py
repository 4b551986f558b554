"""Weights in one shared-memory file: written once by the sender, mapped and checked by the receiver.

Only the manifest (JSON text) travels between the processes. The file belongs to its owner alone (mode 0600), carries a
nonce that the manifest repeats, and is removed when the sender's context ends, whatever happened meanwhile.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zerokl.weightsync.digest import tensor_bytes, tensor_digest
from zerokl.weightsync.errors import WeightSyncError

ALIGNMENT = 64
SHARED_MEMORY = Path("/dev/shm")
_NONCE_BYTES = 16
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: bytes [offset, offset + nbytes), xxh3_128 digest over them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What the file holds. ``total_bytes`` is the file's size; ``nonce`` its first 16 bytes, in hex."""

    path: str
    nonce: str
    version: str
    total_bytes: int
    tensors: tuple[TensorEntry, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_dict(data: Any) -> Manifest:
        """Check and convert decoded JSON. Raises WeightSyncError for anything but a well-formed manifest."""
        try:
            entries = tuple(_entry(item) for item in data["tensors"])
            fields = {name: _typed(data[name], str) for name in ("path", "nonce", "version")}
            return Manifest(**fields, total_bytes=_typed(data["total_bytes"], int), tensors=entries)
        except (KeyError, TypeError) as error:
            raise WeightSyncError(f"malformed manifest: {type(error).__name__}: {error}") from error

    @property
    def digests(self) -> dict[str, str]:
        return {entry.name: entry.digest for entry in self.tensors}


def _entry(item: Any) -> TensorEntry:
    return TensorEntry(
        **{name: _typed(item[name], str) for name in ("name", "dtype", "digest")},
        **{name: _typed(item[name], int) for name in ("offset", "nbytes")},
        shape=tuple(_typed(size, int) for size in item["shape"]),
    )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


@contextmanager
def publish(
    named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: str, directory: Path | None = None
) -> Iterator[Manifest]:
    """Write the tensors to a new shared-memory file; it exists as long as the context.

    ``directory`` defaults to the system's shared memory. Raises WeightSyncError for a repeated name, an unsupported
    dtype, no tensors at all, or too little shared memory.
    """
    tensors = _checked(named_tensors)
    folder = directory or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir()))
    path = folder / f"zerokl-weights-{secrets.token_hex(8)}"
    nonce = secrets.token_bytes(_NONCE_BYTES)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            entries, total = _write(file, nonce, tensors)
        yield Manifest(str(path), nonce.hex(), version, total, entries)
    finally:
        path.unlink(missing_ok=True)


def _checked(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise WeightSyncError(f"tensor {name!r} is given twice")
        if tensor.dtype not in _DTYPES.values():
            raise WeightSyncError(f"tensor {name!r}: dtype {tensor.dtype} is not supported ({', '.join(_DTYPES)})")
        tensors[name] = tensor.detach()
    if not tensors:
        raise WeightSyncError("no tensors to publish")
    return tensors


def _write(file: io.FileIO, nonce: bytes, tensors: dict[str, torch.Tensor]) -> tuple[tuple[TensorEntry, ...], int]:
    """Nonce, then every tensor at an aligned offset; returns the entries and the file's size.

    Plain writes, not a mapping: they cost no page faults, and a full shared memory is an error instead of a bus error.
    """
    entries, end = [], _put(file, 0, nonce)
    for name, tensor in tensors.items():
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        source = tensor.cpu().contiguous()
        end = _put(file, offset, tensor_bytes(source))
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, end - offset, tensor_digest(source)))
    return tuple(entries), end


def _put(file: io.FileIO, offset: int, data: bytes | memoryview) -> int:
    """Write all of ``data`` at ``offset``; returns the offset after it."""
    left = memoryview(data)
    file.seek(offset)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise WeightSyncError(f"cannot write {len(data)} bytes to {file.name!r}: {error.strerror}") from error
    return offset + len(data)


@contextmanager
def open_shared(manifest: Manifest) -> Iterator[dict[str, torch.Tensor]]:
    """Map the file and yield its tensors by name, read-only by convention and valid inside the context only.

    Everything is checked first: owner, size, nonce, bounds, shapes and every digest. Raises WeightSyncError naming the
    tensor and the cause.
    """
    try:
        descriptor = os.open(manifest.path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise WeightSyncError(f"cannot open shared weights {manifest.path!r}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid():
            raise WeightSyncError(f"shared weights {manifest.path!r} belong to user {status.st_uid}, not to this one")
        if status.st_size != manifest.total_bytes:
            raise WeightSyncError(f"shared weights have {status.st_size} bytes, expected {manifest.total_bytes}")
        # a private mapping: torch wants writable memory, and nothing written here could reach the file
        memory = mmap.mmap(descriptor, manifest.total_bytes, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    if memory[:_NONCE_BYTES].hex() != manifest.nonce:
        raise WeightSyncError(
            f"shared weights {manifest.path!r} carry another nonce: the file is not the one announced"
        )
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    yield {entry.name: _view(whole, entry) for entry in manifest.tensors}


def _view(whole: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise WeightSyncError(f"tensor {entry.name!r}: dtype {entry.dtype!r} is not supported")
    elements = 1
    for size in entry.shape:
        if size < 0:
            raise WeightSyncError(f"tensor {entry.name!r}: negative size in shape {entry.shape}")
        elements *= size
    if entry.nbytes != elements * dtype.itemsize:
        raise WeightSyncError(f"tensor {entry.name!r}: {entry.nbytes} bytes do not hold {entry.dtype} {entry.shape}")
    if entry.offset < _NONCE_BYTES or entry.offset % ALIGNMENT or entry.offset + entry.nbytes > whole.numel():
        raise WeightSyncError(f"tensor {entry.name!r}: bytes {entry.offset}+{entry.nbytes} are outside the file")
    view = whole[entry.offset : entry.offset + entry.nbytes].view(dtype).view(entry.shape)
    found = tensor_digest(view)
    if found != entry.digest:
        raise WeightSyncError(f"tensor {entry.name!r}: digest {found} does not match {entry.digest}: corrupted bytes")
    return view
