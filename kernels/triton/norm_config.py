"""Launch shape of the row kernels; nothing here can change a bit (R0, R3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormConfig:
    """rows: rows one program holds side by side; columns: columns one program of the weight gradient owns."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def norm_config(rows: int, width: int) -> NormConfig:
    """One warp per row: a group of 128 lanes is four bf16 (8 bytes) a thread. Short rows share larger programs."""
    side = 4 if width > 256 else 8
    return NormConfig(rows=1 if rows < 256 and width > 256 else side, columns=32, num_warps=4, num_stages=4)
