"""Every number that decides bits, defined once (see CONTRACT.md). The C++ build reads this file through `header()`.

Importing this module needs nothing but the standard library.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field

CONTRACT_VERSION = 4

REDUCTION_LANES = 128
"""R3: lane j of a row reduction takes elements j, j + 128, ..."""

ATTENTION_BLOCK = 64
"""R5: keys per online-softmax block, at absolute positions."""

ATTENTION_SEGMENT = 1024
"""R5: keys per segment; segments are merged in ascending order."""

VOCAB_SEGMENTS = 8
"""R6: segments of the vocabulary, each ceil(V / 8) columns wide."""

FP8_BLOCK = 128
"""Quantisers: edge of an fp8_block, 1 x 128 for activations and 128 x 128 for weights."""

MX_BLOCK = 32
"""Quantisers: elements that share an E8M0 scale."""

E4M3_MAX = 448
"""Quantisers: the largest finite e4m3 value; larger magnitudes saturate to it."""

E4M3_MAX_EXPONENT = 8
"""Quantisers: the exponent of E4M3_MAX, what the FLOOR rule subtracts."""

FP8_AMAX_MIN = "0x1.a36e2ep-14"
"""Quantisers: fp8_block's smallest amax, 1e-4 rounded to fp32."""

INT4_DIVISOR = 7
"""Quantisers: int4_group's scale is amax / 7, so codes stay symmetric."""

INT4_SCALE_MIN = "0x1.4f8b58p-17"
"""Quantisers: int4_group's smallest scale before its rounding to bf16, 1e-5 rounded to fp32."""

# R4. Minimax fits (Remez, relative error below 2^-25 before rounding), rounded to fp32, lowest degree first.
# exp2(f) = 1 + f * P(f) for f in [-0.5, 0.5]
EXP2_POLY = (
    "0x1.62e4300000000p-1",
    "0x1.ebfbdc0000000p-3",
    "0x1.c6aee80000000p-5",
    "0x1.3b2d4c0000000p-7",
    "0x1.5f3e540000000p-10",
    "0x1.41fbbc0000000p-13",
)
# log2(1 + t) = t * Q(t) for t in [sqrt(1/2) - 1, sqrt(2) - 1]
LOG2_POLY = (
    "0x1.7154760000000p+0",
    "-0x1.7154700000000p-1",
    "0x1.ec70960000000p-2",
    "-0x1.715a760000000p-2",
    "0x1.277e360000000p-2",
    "-0x1.eabc860000000p-3",
    "0x1.a305a60000000p-3",
    "-0x1.874bee0000000p-3",
    "0x1.7d49500000000p-3",
    "-0x1.c25a620000000p-4",
)
LOG2E = "0x1.715476p+0"
LN2 = "0x1.62e430p-1"


@dataclass(frozen=True)
class Profile:
    """The arithmetic one class of hardware runs. Results of different profiles are never mixed in one run."""

    name: str
    linear: str
    attention_exp2: str
    attention_weights: str


CPU = Profile(
    name="cpu-bf16-pairs",
    linear="fp32 chain over ascending pairs of k, odd k first, subnormals flushed",
    attention_exp2="polynomial",
    attention_weights="fp32",
)

SM90 = Profile(
    name="sm90-bf16",
    linear="one fp32 accumulator through bf16 matrix steps of 16 ascending k, K zero-padded to whole steps",
    attention_exp2="polynomial",
    attention_weights="rounded once to bf16 before each product, not before their sum",
)


@dataclass(frozen=True)
class MatrixStep:
    """One matrix instruction of a tensor core and the model of its arithmetic (R1).

    A tile is [rows, depth] times [columns, depth] transposed, plus [rows, columns] in fp32. ``fraction``: bits kept
    below the largest exponent when the terms are aligned; ``result``: fraction bits of the result.
    """

    instruction: str
    element: str
    rows: int
    columns: int
    depth: int
    fraction: int
    result: int


MATRIX_STEPS = (
    MatrixStep("mma.m16n8k16.bf16", "bf16", 16, 8, 16, fraction=25, result=23),
    MatrixStep("wgmma.m64n8k16.bf16", "bf16", 64, 8, 16, fraction=25, result=23),
    MatrixStep("wgmma.m64n8k32.e4m3", "e4m3", 64, 8, 32, fraction=13, result=13),
)
"""Capability 9.0 and newer; wgmma exists on 9.0 only. Wider tiles of an instruction have the same arithmetic. Hopper
has no mma of its own for fp8."""

MATRIX_STEP_ZERO = -133
"""R1: the exponent a zero term is aligned with."""


@dataclass(frozen=True)
class Manifest:
    """What a run computed with: contract version, profile, and every op with its backend and configuration."""

    contract: int
    profile: str
    ops: dict[str, dict[str, object]]
    machine: str = field(default_factory=platform.machine)

    def to_dict(self) -> dict[str, object]:
        """The manifest as plain JSON-able data."""
        return asdict(self)


def header() -> str:
    """The same numbers as a C++ header."""
    poly = "\n".join(
        f"inline constexpr float {name}[] = {{{', '.join(c + 'f' for c in coefficients)}}};"
        for name, coefficients in (("kExp2Poly", EXP2_POLY), ("kLog2Poly", LOG2_POLY))
    )
    return f"""// Written by kernels/contract.py at build time.
#pragma once
namespace zerokl {{
inline constexpr int kContractVersion = {CONTRACT_VERSION};
inline constexpr int kLanes = {REDUCTION_LANES};
inline constexpr int kAttentionBlock = {ATTENTION_BLOCK};
inline constexpr int kAttentionSegment = {ATTENTION_SEGMENT};
inline constexpr int kVocabSegments = {VOCAB_SEGMENTS};
inline constexpr int kFp8Block = {FP8_BLOCK};
inline constexpr int kMxBlock = {MX_BLOCK};
inline constexpr float kE4m3Max = {E4M3_MAX}.0f;
inline constexpr int kE4m3MaxExponent = {E4M3_MAX_EXPONENT};
inline constexpr float kFp8AmaxMin = {FP8_AMAX_MIN}f;
inline constexpr float kInt4Divisor = {INT4_DIVISOR}.0f;
inline constexpr float kInt4ScaleMin = {INT4_SCALE_MIN}f;
inline constexpr int kMatrixStepZero = {MATRIX_STEP_ZERO};
inline constexpr float kLog2e = {LOG2E}f;
inline constexpr float kLn2 = {LN2}f;
{poly}
}}  // namespace zerokl
"""


if __name__ == "__main__":
    print(header(), end="")
