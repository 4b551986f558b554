"""Launch shapes of the log-probability kernels; nothing here can change a bit (R0, R3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentConfig:
    """rows: rows of one vocabulary segment that a program sums side by side."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ElementwiseConfig:
    """block: columns a program owns."""

    block: int
    num_warps: int


def segment_config(rows: int) -> SegmentConfig:
    """Small calls spread over programs; large ones give each warp a row (16 bytes of logits a thread)."""
    return SegmentConfig(1, 1, 4) if rows < 64 else SegmentConfig(4, 4, 4)


def elementwise_config() -> ElementwiseConfig:
    """Two vectors of 16 bytes a thread."""
    return ElementwiseConfig(1024, 4)


def rows_at_once(columns: int) -> int:
    """Rows whose fp32 logits of ``columns`` fill about 32 MiB, which stays in L2: whole tiles of 128.

    A multiple of 16 keeps the weight gradient's chain over tokens what it is in one piece (its steps are 16 deep).
    """
    return max(128, (32 << 20) // (4 * columns) // 128 * 128)
