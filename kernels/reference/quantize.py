"""Quantisers and the linear layers on their codes, in scalar order (CONTRACT.md, Quantisers).

e4m3 is rounded here by float64 arithmetic on values, and powers of two come from ``frexp``: no bit pattern of fp32 is
touched, so this file shares nothing with the compiled code but the rules.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import contract
from .arith import F32, Array, bf16, chain

E4M3_MAX = F32(contract.E4M3_MAX)
FP8_AMAX_MIN = F32(float.fromhex(contract.FP8_AMAX_MIN))
INT4_SCALE_MIN = F32(float.fromhex(contract.INT4_SCALE_MIN))
INT4_DIVISOR = F32(contract.INT4_DIVISOR)
NAN = F32(np.nan)


def e4m3_value(codes: Array) -> Array:
    """The fp32 value of e4m3 codes (uint8): sign, 4 bits of exponent with bias 7, 3 bits of mantissa; 0x7f is NaN."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int64), (codes & 7).astype(np.float64)
    value = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    value = np.where(codes & 0x7F == 0x7F, np.nan, value)
    return np.where(codes & 0x80, -value, value).astype(F32)


def e4m3(x: Array) -> Array:
    """fp32 to e4m3 codes: nearest even, saturating at 448, the sign of zero kept, every NaN to 0x7f."""
    a = np.abs(np.where(np.isnan(x), 0, x).astype(np.float64))
    a = np.minimum(a, float(E4M3_MAX))
    exponent = np.maximum(np.frexp(a)[1] - 1, -6)  # of the leading bit; subnormals share the smallest
    steps = np.rint(np.ldexp(a, 3 - exponent)).astype(np.int64)  # 0 ... 16 eighths; 16 carries into the exponent
    code = np.where(steps >= 8, (exponent + 7) * 8 + steps - 8, steps)
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def power_ceil(x: F32) -> int:
    """The exponent of the smallest power of two that is not below x > 0."""
    mantissa, exponent = np.frexp(np.float64(x))  # mantissa in [1/2, 1)
    return int(exponent) - 1 if mantissa == 0.5 else int(exponent)


def fp8_scale(amax: F32) -> tuple[F32, F32]:
    """(scale, its reciprocal), each rounded."""
    scale = np.maximum(amax, FP8_AMAX_MIN) / E4M3_MAX
    return scale, F32(1) / scale


def fp8_power_of_two_scale(amax: F32) -> tuple[F32, F32]:
    """The same, up to the next power of two."""
    e = power_ceil(np.maximum(amax, FP8_AMAX_MIN) / E4M3_MAX)
    return F32(2.0**e), F32(2.0**-e)


def mx_rceil(amax: F32) -> int:
    """Exponent of an MX block's scale, RCEIL: amax / 448 up to a power of two."""
    return max(power_ceil(amax / E4M3_MAX), -127) if amax > 0 else -127


def mx_floor(amax: F32) -> int:
    """FLOOR (OCP MX v1.0, 6.3): the exponent of amax less that of 448."""
    return max(int(np.frexp(amax)[1]) - 1 - contract.E4M3_MAX_EXPONENT, -127) if amax > 0 else -127


def int4_scale(amax: F32) -> Array:
    """The stored scale, rounded to bf16 before any code is computed from it."""
    return bf16(np.maximum(amax / INT4_DIVISOR, INT4_SCALE_MIN))


Place = tuple[tuple[int, int], tuple[slice, slice]]


def _blocks(x: Array, rows: int, columns: int) -> tuple[tuple[int, int], list[Place]]:
    """The grid of blocks over a matrix and each one's place in grid and matrix; blocks at the edges may be narrower."""
    grid = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    return grid, [
        ((i, j), (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)))
        for i in range(grid[0])
        for j in range(grid[1])
    ]


def quantize_fp8_block(x: Array, block: tuple[int, int], *, power_of_two: bool = False) -> tuple[Array, Array]:
    """x [rows, k]: (codes uint8, fp32 scales)."""
    scale_of: Callable[[F32], tuple[F32, F32]] = fp8_power_of_two_scale if power_of_two else fp8_scale
    grid, blocks = _blocks(x, *block)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(grid, F32)
    for at, where in blocks:
        amax = np.abs(x[where]).max()
        scale, inverse = scale_of(amax) if np.isfinite(amax) else (NAN, NAN)
        scales[at], codes[where] = scale, e4m3((x[where] * inverse).astype(F32))
    return codes, scales


def quantize_mxfp8(x: Array, *, rounding: str = "rceil") -> tuple[Array, Array]:
    """x [rows, k]: (codes uint8, E8M0 scales uint8)."""
    exponent_of = mx_rceil if rounding == "rceil" else mx_floor
    grid, blocks = _blocks(x, 1, contract.MX_BLOCK)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(grid, np.uint8)
    for at, where in blocks:
        amax = np.abs(x[where]).max()
        e = exponent_of(amax) if np.isfinite(amax) else None
        scales[at] = 255 if e is None else e + 127
        codes[where] = e4m3((x[where] * (NAN if e is None else F32(2.0**-e))).astype(F32))
    return codes, scales


def quantize_int4_group(x: Array, group: int) -> tuple[Array, Array]:
    """x [rows, k]: (int32 words of eight codes, bf16 scales as fp32)."""
    grid, blocks = _blocks(x, 1, group)
    codes, scales = np.zeros(x.shape, np.int64), np.zeros(grid, F32)
    for at, where in blocks:
        amax = np.abs(x[where]).max()
        if not np.isfinite(amax):
            scales[at] = NAN
            continue
        scales[at] = int4_scale(amax)
        codes[where] = np.clip(np.rint((x[where] / scales[at]).astype(F32)), -8, 7)
    nibbles = (codes + 8).reshape(x.shape[0], -1, 8) << (4 * np.arange(8))
    return nibbles.sum(-1).astype(np.uint32).view(np.int32), scales


def e8m0_value(scales: Array) -> Array:
    """The fp32 value of E8M0 scales (uint8); 255 is NaN."""
    return np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(np.int64) - 127)).astype(F32)


def int4_value(words: Array) -> Array:
    """The codes -8 ... 7 of int32 words, as fp32."""
    nibbles = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    return (nibbles.reshape(words.shape[0], -1).astype(np.int64) - 8).astype(F32)


def dequantize(values: Array, scales: Array, block: tuple[int, int]) -> Array:
    """Code values [rows, k] times their blocks' scales, rounded to fp32, then to bf16."""
    spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: values.shape[0], : values.shape[1]]
    with np.errstate(over="ignore"):
        return bf16((values * spread).astype(F32))


def scaled_linear(
    x: Array, x_scales: Array, w: Array, w_scales: Array, block: int, w_rows: int, bias: Array | None = None
) -> Array:
    """fp32 [M, N] of code values x [M, K], w [N, K]: one R1 chain per block of k, promoted in ascending order."""
    acc = np.zeros((x.shape[0], w.shape[0]), F32)
    spread = np.repeat(w_scales, w_rows, 0)[: w.shape[0]]
    for b in range(x_scales.shape[1]):
        k = slice(b * block, (b + 1) * block)
        with np.errstate(all="ignore"):
            scale = (x_scales[:, b, None] * spread[None, :, b]).astype(F32)
            acc = (acc + (scale * chain(x[:, k], w[:, k].T)).astype(F32)).astype(F32)
    return acc if bias is None else (acc + bias).astype(F32)
