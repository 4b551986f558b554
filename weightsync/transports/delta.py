"""Changed elements only: where two versions of a buffer differ, in units of two bytes, compressed."""

from __future__ import annotations

import numpy as np
import torch
import zstandard

from zerokl.weightsync.plan import Copy
from zerokl.weightsync.transports.base import TransferError

UNIT = 2
_MAX_UNITS = 1 << 32


def encode(old: torch.Tensor, new: torch.Tensor) -> tuple[bytes, bytes]:
    """(gaps between changed units, their new values), each zstd over little-endian numbers, u4 and u2.

    Both are uint8 [n]. Raises TransferError if they differ in size, or n is odd or at least 8 GiB.
    """
    if old.numel() != new.numel() or new.numel() % UNIT or new.numel() // UNIT >= _MAX_UNITS:
        raise TransferError(f"no delta between buffers of {old.numel()} and {new.numel()} bytes")
    before, after = old.numpy().view("<u2"), new.numpy().view("<u2")
    changed = np.flatnonzero(before != after)
    gaps = np.diff(changed, prepend=0).astype("<u4")
    compress = zstandard.ZstdCompressor(level=3).compress
    return compress(gaps.tobytes()), compress(after[changed].tobytes())


def decode(gaps: bytes, values: bytes, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(byte positions of the changed units, ascending, int64; their values, uint16) of a buffer of ``nbytes``.

    Raises TransferError for anything that `encode` cannot have made.
    """
    units = nbytes // UNIT
    steps = np.frombuffer(_decompress(gaps, 4 * units), "<u4").astype(np.int64)
    found = np.frombuffer(_decompress(values, UNIT * units), "<u2")
    positions = np.cumsum(steps)
    if len(steps) != len(found) or (steps[1:] < 1).any() or (len(positions) and positions[-1] >= units):
        raise TransferError(f"a damaged delta: {len(steps)} places and {len(found)} values for {units} units")
    return positions * UNIT, found


def apply(copy: Copy, target: torch.Tensor, positions: np.ndarray, values: np.ndarray) -> int:
    """Write those changed units of a source buffer that a copy covers into its target buffer; returns their bytes."""
    first, last = copy.source_offset, copy.source_offset + (copy.rows - 1) * copy.source_pitch + copy.row_bytes
    low, high = np.searchsorted(positions, [first - UNIT + 1, last])
    row, column = np.divmod(positions[low:high] - first, copy.source_pitch)
    inside = column < copy.row_bytes
    if any(n % UNIT for n in (first, copy.source_pitch, copy.row_bytes, copy.target_offset, copy.target_pitch)):
        raise TransferError(f"{copy.tensor!r} does not lie in units of {UNIT} bytes: no delta")
    places = copy.target_offset + row[inside] * copy.target_pitch + column[inside]
    target.numpy()[: target.numel() // UNIT * UNIT].view("<u2")[places // UNIT] = values[low:high][inside]
    return int(inside.sum()) * UNIT


def _decompress(data: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes, however much the data claims to hold."""
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size > limit:
            raise TransferError(f"a delta of {size} bytes, at most {limit} make sense")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TransferError(f"a damaged delta: {error}") from error
