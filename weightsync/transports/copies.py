"""Carrying out and digesting the copies of a plan on memory of this machine."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import xxhash

from zerokl.weightsync.digest import tensor_bytes
from zerokl.weightsync.plan import Batch, Copy
from zerokl.weightsync.transports.base import Buffers, TransferError


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


def source_digests(buffers: Buffers, batches: Iterable[Batch]) -> tuple[bytes, ...]:
    """xxh3_128 of what each copy reads, in order; what goes to several receivers is read once."""
    copies = [copy for batch in batches for copy in batch.copies]
    read = {_source(copy): source_view(buffers, copy) for copy in copies}
    known = dict(zip(read, _digests(list(read.values())), strict=True))
    return tuple(known[_source(copy)] for copy in copies)


def target_digests(buffers: Buffers, batches: Iterable[Batch]) -> tuple[bytes, ...]:
    """xxh3_128 of what each copy has written, in order."""
    return tuple(_digests([target_view(buffers, copy) for batch in batches for copy in batch.copies]))


def _source(copy: Copy) -> tuple[str, int, int, int, int]:
    return copy.source_buffer, copy.source_offset, copy.source_pitch, copy.rows, copy.row_bytes


def _digests(views: list[torch.Tensor]) -> list[bytes]:
    """xxh3_128 of every view [rows, bytes of a row], computed where the bytes are."""
    if any(view.is_cuda for view in views):
        from zerokl.weightsync.device_digest import digests  # needs triton, which machines without a GPU may lack

        return digests(views)
    return [xxhash.xxh3_128_digest(tensor_bytes(view.contiguous())) for view in views]


def move(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes between two views of one shape. Between CPU tensors by numpy: torch would spread this over threads,
    which on a machine whose cores an engine is using wait for each other."""
    if target.is_cuda or source.is_cuda:
        target.copy_(source)
        return
    np.copyto(target.numpy(), source.numpy())


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
