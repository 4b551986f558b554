"""Launch shape of the rotary kernel; nothing here can change a bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RotaryConfig:
    """heads: heads of one token that a program turns."""

    heads: int
    num_warps: int


def rotary_config(heads: int) -> RotaryConfig:
    """Up to 16 heads a program: they share one row of the table."""
    block = 1
    while block < min(heads, 16):
        block *= 2
    return RotaryConfig(heads=block, num_warps=4 if block > 4 else 1)
