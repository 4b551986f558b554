"""Tile sizes of the products on codes. No rule fixes them, but one kind of matrix instruction serves every M.

On sm_90 fewer than 64 rows would become ``mma.sync``, for which fp8 is widened to fp16: sums of other bits than those
of ``wgmma``, and a row's bits must not depend on how many rows are in the call (R0).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedLinearConfig:
    """A program computes block_m x block_n outputs; group: row blocks that share W in L2."""

    block_m: int
    block_n: int
    group: int
    num_warps: int
    num_stages: int


def scaled_linear_config(m: int) -> QuantizedLinearConfig:
    """The widest tiles that spill nothing: a block's partial lives beside the accumulator."""
    return QuantizedLinearConfig(64, 64, 1, 4, 4) if m <= 64 else QuantizedLinearConfig(64, 128, 8, 4, 4)


def int4_linear_config(m: int) -> QuantizedLinearConfig:
    """The same: dequantised W lives beside the accumulator. Tall tiles, for each dequantises W again."""
    return QuantizedLinearConfig(64, 64, 1, 4, 4) if m <= 64 else QuantizedLinearConfig(128, 64, 8, 8, 4)
