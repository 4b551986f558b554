"""Tile sizes of the matrix product, by shape alone. The contract is the k order; tiles, warps and stages are free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearConfig:
    """A program computes block_m x block_n outputs, block_k deep at a time; group: row blocks that share B in L2."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


def linear_config(m: int, n: int, segments: int) -> LinearConfig:
    """Tiles for [m, k] x [k, n] in ``segments`` chains, of which log2(segments) + 1 accumulators live at once."""
    if m <= 16:
        return LinearConfig(16, 64, 128, 1, 4, 4)
    if m <= 64:
        return LinearConfig(64, 64, 64, 1, 4, 4)
    if segments > 1:
        return LinearConfig(64, 128, 64, 8, 8, 3)
    if m <= 128 or n <= 1024:
        return LinearConfig(128, 64, 64, 8, 4, 4)
    return LinearConfig(128, 128, 64, 8, 8, 4)
