"""Carrying out and digesting the copies of a plan on memory of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from zerokl.weightsync.plan import Batch, Copy
from zerokl.weightsync.transports.base import Buffers, TransferError

THREADS = min(8, len(os.sched_getaffinity(0)))
"""How many threads copy or digest: a few cores take up the bandwidth of a machine's memory."""
_STEP = 1 << 20
"""Bytes copied before the same bytes are digested: they are still in a core's cache then."""


def view(buffer: torch.Tensor, offset: int, pitch: int, copy: Copy) -> torch.Tensor:
    """The bytes [rows, row_bytes] of one side of a copy, without copying. Raises TransferError outside the buffer."""
    end = offset + (copy.rows - 1) * pitch + copy.row_bytes
    if offset < 0 or end > buffer.numel():
        raise TransferError(f"{copy.tensor!r}: bytes {offset}..{end} are outside a buffer of {buffer.numel()}")
    return buffer.as_strided((copy.rows, copy.row_bytes), (pitch, 1), buffer.storage_offset() + offset)


def source_view(buffers: Buffers, copy: Copy) -> torch.Tensor:
    return view(buffers[copy.source_buffer], copy.source_offset, copy.source_pitch, copy)


def target_view(buffers: Buffers, copy: Copy) -> torch.Tensor:
    return view(buffers[copy.target_buffer], copy.target_offset, copy.target_pitch, copy)


def source_digests(buffers: Buffers, batches: Iterable[Batch], known: Mapping[Copy, bytes]) -> tuple[bytes, ...]:
    """xxh3_128 of what each copy reads, in order; what goes to several receivers is read once, what is ``known`` not
    at all."""
    copies = [copy for batch in batches for copy in batch.copies]
    found = {_source(copy): known[copy] for copy in copies if copy in known}
    read = {_source(copy): source_view(buffers, copy) for copy in copies if _source(copy) not in found}
    found.update(zip(read, _digests(list(read.values())), strict=True))
    return tuple(found[_source(copy)] for copy in copies)


def target_digests(buffers: Buffers, batches: Iterable[Batch], known: Mapping[Copy, bytes]) -> tuple[bytes, ...]:
    """xxh3_128 of what each copy has written, in order; what is ``known`` is not read again."""
    copies = [copy for batch in batches for copy in batch.copies]
    found = dict(known)
    missing = [copy for copy in copies if copy not in found]
    found.update(zip(missing, _digests([target_view(buffers, copy) for copy in missing]), strict=True))
    return tuple(found[copy] for copy in copies)


def _source(copy: Copy) -> tuple[str, int, int, int, int]:
    return copy.source_buffer, copy.source_offset, copy.source_pitch, copy.rows, copy.row_bytes


def _digests(views: list[torch.Tensor]) -> list[bytes]:
    """xxh3_128 of every view [rows, bytes of a row], computed where the bytes are."""
    if any(view.is_cuda for view in views):
        from zerokl.weightsync.device_digest import digests  # needs triton, which machines without a GPU may lack

        return digests(views)
    found = [b""] * len(views)
    left = enumerate(views)  # shared: each thread takes the next one, so none waits for a busy core

    def take() -> None:
        for index, view in left:
            found[index] = digest(view.numpy())

    with ThreadPoolExecutor(THREADS) as pool:
        for thread in [pool.submit(take) for _ in range(min(THREADS, len(views)))]:
            thread.result()
    return found


def digest(view: np.ndarray) -> bytes:
    """xxh3_128 of the bytes [rows, bytes of a row]."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(view).data)


def move(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes between two views of one shape. Between CPU tensors by numpy: torch would spread this over threads,
    which on a machine whose cores an engine is using wait for each other."""
    if target.is_cuda or source.is_cuda:
        target.copy_(source)
        return
    np.copyto(target.numpy(), source.numpy())


def move_and_digest(target: np.ndarray, source: np.ndarray) -> bytes:
    """Copy the bytes [rows, bytes of a row], and xxh3_128 of the source, which is read from memory once for both."""
    state = xxhash.xxh3_128()
    for there, here in _steps(target, source):
        np.copyto(there, here)
        state.update(np.ascontiguousarray(here).data)
    return state.digest()


def bytes_at(memory: np.ndarray, offset: int, pitch: int, copy: Copy) -> np.ndarray:
    """What `view` returns, of numpy's memory: much faster to make. Raises TransferError outside of it."""
    try:
        return np.ndarray((copy.rows, copy.row_bytes), np.uint8, memory, offset, (pitch, 1))
    except (TypeError, ValueError) as error:
        raise TransferError(f"{copy.tensor!r} at {offset} is outside of {memory.size} bytes: {error}") from error


def _steps(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both, cut alike into parts of about _STEP bytes, in memory order."""
    if len(source) == 1:
        target, source = target[0], source[0]
    height = max(1, _STEP * len(source) // max(1, source.size))
    for top in range(0, len(source), height):
        yield target[top : top + height], source[top : top + height]


def pack(buffers: Buffers, batch: Batch) -> torch.Tensor:
    """All source bytes of a batch, one after the other."""
    device = buffers[batch.copies[0].source_buffer].device
    packed, start = torch.empty(batch.nbytes, dtype=torch.uint8, device=device), 0
    for copy in batch.copies:
        move(packed[start : start + copy.nbytes].view(copy.rows, copy.row_bytes), source_view(buffers, copy))
        start += copy.nbytes
    return packed


def unpack(buffers: Buffers, batch: Batch, packed: torch.Tensor) -> None:
    """Write the bytes of a packed batch to their targets."""
    start = 0
    for copy in batch.copies:
        move(target_view(buffers, copy), packed[start : start + copy.nbytes].view(copy.rows, copy.row_bytes))
        start += copy.nbytes
