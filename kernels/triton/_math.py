"""Building blocks of the contract in Triton: bf16 rounding (R7), exp2 and log2 (R4), halving tree (R3), hash (R6).

Everything here gives the bits of ``kernels/cpu/simd.h``. Each fma is written out; nothing relies on contraction, and
every launch passes ``enable_fp_fusion=False`` (see :func:`launch_options`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import contract

LANES = tl.constexpr(contract.REDUCTION_LANES)
LOG2E = tl.constexpr(float.fromhex(contract.LOG2E))
LN2 = tl.constexpr(float.fromhex(contract.LN2))
_EXP2_POLY = tl.constexpr(tuple(float.fromhex(c) for c in contract.EXP2_POLY))
_LOG2_POLY = tl.constexpr(tuple(float.fromhex(c) for c in contract.LOG2_POLY))
_EXP2_DEGREE = tl.constexpr(len(contract.EXP2_POLY) - 1)
_LOG2_DEGREE = tl.constexpr(len(contract.LOG2_POLY) - 1)
_INF = tl.constexpr(float("inf"))
_ROUND = tl.constexpr(1.5 * 2.0**23)
_TINY = tl.constexpr(2.0**-126)


def launch_options(num_warps: int, num_stages: int = 1) -> dict[str, int | bool]:
    """Launch arguments of every kernel. Fusion is named because Triton's default for it differs between releases."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}


@triton.jit
def to_bf16(x):
    """fp32 to bf16: nearest even, subnormals kept, every NaN 0x7fc0 (the conversion instruction gives 0x7fff)."""
    u = x.to(tl.uint32, bitcast=True)
    u = tl.where(x == x, (u + 0x7FFF + ((u >> 16) & 1)) >> 16, 0x7FC0)
    return u.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_f32(x):
    """bf16 to fp32: the upper half of the word."""
    return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def horner(coefficients: tl.constexpr, DEGREE: tl.constexpr, x):
    """Polynomial, lowest degree first, one fma per coefficient but the last."""
    p = tl.full(x.shape, coefficients[DEGREE], tl.float32)
    for i in tl.static_range(1, DEGREE + 1):
        p = tl.fma(p, x, tl.full(x.shape, coefficients[DEGREE - i], tl.float32))
    return p


@triton.jit
def exp2(x):
    """2^x (R4): 1 at 0, 0 below -150, inf above 128, NaN kept, one rounding even into subnormals."""
    y = tl.where(x < -160.0, -160.0, x)
    y = tl.where(y > 130.0, 130.0, y)
    n = (y + _ROUND) - _ROUND
    f = y - n
    p = tl.fma(horner(_EXP2_POLY, _EXP2_DEGREE, f), f, tl.full(x.shape, 1.0, tl.float32))
    # 2^n in two exact factors: only the last product rounds
    k = tl.where(n == n, n, 0.0).to(tl.int32)
    half = k >> 1
    p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return p * ((k - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """e^x as exp2 of the rounded product (R4)."""
    return exp2(x * LOG2E)


@triton.jit
def log2(x):
    """log2(x) (R4): -inf at 0, NaN below, subnormals kept."""
    tiny = x < _TINY
    bits = tl.where(tiny, x * 16777216.0, x).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    t = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    r = tl.fma(t, horner(_LOG2_POLY, _LOG2_DEGREE, t), tl.where(tiny, e - 24, e).to(tl.float32))
    r = tl.where(x == 0.0, -_INF, r)
    r = tl.where(x == _INF, x, r)
    return tl.where(x >= 0.0, r, float("nan"))


@triton.jit
def fold(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """R3's halving tree over the last axis: [ROWS, COLUMNS] to [ROWS], ``t[i] + t[i + half]`` down to one."""
    half: tl.constexpr = COLUMNS // 2
    low, high = tl.split(tl.permute(tl.reshape(t, (ROWS, 2, half)), (0, 2, 1)))
    if half == 1:
        return tl.reshape(low + high, (ROWS,))
    else:
        return fold(low + high, ROWS, half)


@triton.jit
def mix(x):
    """The 32-bit integer hash "lowbias32" (Wellons) of uint32 values."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)
