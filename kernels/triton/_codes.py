"""What codes and scales stand for, in Triton (CONTRACT.md, Quantisers): e4m3, E8M0 and int4 by integer arithmetic.

Everything here gives the bits of ``kernels/cpu/quantize.cpp``. No conversion instruction takes part: those differ from
the contract, and between GPUs and Triton's interpreter, in saturation and NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import contract
from ._math import to_f32

_E4M3_MAX = tl.constexpr(float(contract.E4M3_MAX))
_NAN = tl.constexpr(0x7FC00000)
_ROUND_SUBNORMAL = tl.constexpr(2.0**14)  # its ulp, 2^-9, is the spacing of e4m3 subnormals


@triton.jit
def to_e4m3(x):
    """fp32 to e4m3 codes (uint8): nearest even, saturating, sign kept, every NaN 0x7f."""
    u = x.to(tl.int32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    a = tl.minimum(magnitude.to(tl.float32, bitcast=True), _E4M3_MAX)
    bits = a.to(tl.int32, bitcast=True)
    # normal: round away 20 mantissa bits, then move the exponent's bias from 127 to 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the sum rounds to a multiple of 2^-9; its low bits count them
    subnormal = (a + _ROUND_SUBNORMAL).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(a < 0.015625, subnormal, normal) | ((u >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def e4m3_to_f32(code):
    """e4m3 codes (uint8) to fp32, exact; 0x7f and 0xff are NaN."""
    c = code.to(tl.int32)
    a = c & 0x7F
    subnormal = (a.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)  # a 2^-9
    number = tl.where(a < 8, subnormal, (a << 20) + (120 << 23))
    return (tl.where(a == 0x7F, _NAN, number) | ((c & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_to_f32(e):
    """2^(e - 127) for e in 0 ... 255: E8M0, whose 0 is the subnormal 2^-127 and whose 255 is NaN."""
    e = e.to(tl.int32)
    return tl.where(e == 0, 0x400000, tl.where(e == 255, _NAN, e << 23)).to(tl.float32, bitcast=True)


@triton.jit
def scale_to_f32(scale):
    """Stored scales as fp32: E8M0 bytes, bf16, or fp32 as they are."""
    if scale.dtype == tl.uint8:
        return e8m0_to_f32(scale)
    elif scale.dtype == tl.bfloat16:
        return to_f32(scale)
    else:
        return scale


@triton.jit
def ceil_exponent(x):
    """Biased exponent of the smallest power of two that is not below x, for finite x >= 0; 0 stands for 2^-127."""
    u = x.to(tl.int32, bitcast=True)
    return tl.where(u < 0x800000, (u > 0x400000).to(tl.int32), (u >> 23) + ((u & 0x7FFFFF) != 0).to(tl.int32))


@triton.jit
def int4_to_f32(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 words [ROWS, COLUMNS / 8] of eight nibbles, the first lowest, to codes -8 ... 7 as fp32 [ROWS, COLUMNS]."""
    nibble = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    return tl.reshape(nibble - 8, (ROWS, COLUMNS)).to(tl.float32)


@triton.jit
def int4_pack(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes -8 ... 7 (int32) [ROWS, COLUMNS] to words [ROWS, COLUMNS / 8]: the inverse of :func:`int4_to_f32`."""
    nibble = tl.reshape(codes + 8, (ROWS, COLUMNS // 8, 8)) << (4 * tl.arange(0, 8))[None, None, :]
    return tl.sum(nibble, axis=2)
