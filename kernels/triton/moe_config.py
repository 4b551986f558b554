"""Launch shapes of the mixture-of-experts kernels; nothing here can change a bit (R0, R3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """rows: rows that a program holds side by side."""

    rows: int
    num_warps: int


@dataclass(frozen=True)
class ColumnsConfig:
    """block: columns of one row that a program owns."""

    block: int
    num_warps: int


def combine_config(width: int) -> ColumnsConfig:
    """Eight bf16 (16 bytes) a thread where the row is long enough."""
    return ColumnsConfig(1024, 4) if width >= 1024 else ColumnsConfig(256, 1)


def combine_backward_config() -> RowsConfig:
    """One warp per (token, slot): a group of 128 lanes is four bf16 (8 bytes) a thread."""
    return RowsConfig(4, 4)
