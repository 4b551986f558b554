"""Launch shape of the quantisers; nothing here can change a bit: blocks share nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizeConfig:
    """groups: rows of a block, or blocks of one row, that a program holds side by side."""

    groups: int
    num_warps: int


def quantize_config(rows: int, columns: int) -> QuantizeConfig:
    """For blocks of rows x columns: a square block whole; else 2048 elements, two 16-byte loads a thread."""
    return QuantizeConfig(groups=rows, num_warps=8) if rows > 1 else QuantizeConfig(groups=2048 // columns, num_warps=4)
