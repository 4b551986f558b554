"""Changed bytes only: where two versions of a buffer differ, compressed."""

from __future__ import annotations

import numpy as np
import torch
import zstandard

from zerokl.weightsync.plan import Copy
from zerokl.weightsync.transports.base import TransferError

_MAX_BYTES = 1 << 32


def encode(old: torch.Tensor, new: torch.Tensor) -> tuple[bytes, bytes]:
    """(gaps between changed bytes, little-endian u4; their new values), each compressed by zstd.

    Both are uint8 [n]. Raises TransferError if they differ in size, or n is 4 GiB or more.
    """
    if old.numel() != new.numel() or new.numel() >= _MAX_BYTES:
        raise TransferError(f"no delta between buffers of {old.numel()} and {new.numel()} bytes")
    before, after = old.numpy(), new.numpy()
    changed = np.flatnonzero(before != after)
    gaps = np.diff(changed, prepend=0).astype("<u4")
    compress = zstandard.ZstdCompressor(level=3).compress
    return compress(gaps.tobytes()), compress(after[changed].tobytes())


def decode(gaps: bytes, values: bytes, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the changed bytes, ascending, int64; their values, uint8) of a buffer of ``nbytes``.

    Raises TransferError for anything that `encode` cannot have made.
    """
    steps = np.frombuffer(_decompress(gaps, 4 * nbytes), "<u4").astype(np.int64)
    found = np.frombuffer(_decompress(values, nbytes), np.uint8)
    positions = np.cumsum(steps)
    if len(steps) != len(found) or (steps[1:] < 1).any() or (len(positions) and positions[-1] >= nbytes):
        raise TransferError(f"a damaged delta: {len(steps)} places and {len(found)} values for {nbytes} bytes")
    return positions, found


def apply(copy: Copy, target: torch.Tensor, positions: np.ndarray, values: np.ndarray) -> int:
    """Write those changed bytes of a source buffer that a copy covers into its target buffer; returns how many."""
    first, last = copy.source_offset, copy.source_offset + (copy.rows - 1) * copy.source_pitch + copy.row_bytes
    low, high = np.searchsorted(positions, [first, last])
    row, column = np.divmod(positions[low:high] - first, copy.source_pitch)
    inside = column < copy.row_bytes
    places = copy.target_offset + row[inside] * copy.target_pitch + column[inside]
    target.numpy()[places] = values[low:high][inside]
    return int(inside.sum())


def _decompress(data: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes, however much the data claims to hold."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > limit:
            raise TransferError(f"a delta of {size} bytes, at most {limit} make sense")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TransferError(f"a damaged delta: {error}") from error
