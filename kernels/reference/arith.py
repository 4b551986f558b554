"""Exact building blocks (R0, R3, R4): one-rounding fma, bf16 rounding, exp2, log2, lane reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import contract

F32 = np.float32
Array = np.ndarray


def _view(x: Array, dtype: type) -> Array:
    """The bits of x, also for a scalar (ascontiguousarray alone would make it one-dimensional)."""
    return np.ascontiguousarray(x).view(dtype).reshape(np.shape(x))


def _odd_sum(a: Array | F32, b: Array | F32, c: Array | F32) -> Array:
    """``a * b + c`` of fp32 values in float64, rounded to odd (Boldo and Melquiond, 2008).

    The product is exact in float64; rounding the odd-rounded sum once more, to fp32, cannot round twice.
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    # Knuth's two-sum: what the rounded total lost
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    even_inexact = (_view(total, np.int64) & 1 == 0) & (lost != 0) & np.isfinite(total)
    return np.where(even_inexact, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)


def fma(a: Array | F32, b: Array | F32, c: Array | F32) -> Array:
    """``a * b + c`` in fp32 with one rounding, elementwise."""
    with np.errstate(all="ignore"):
        return _odd_sum(a, b, c).astype(F32)


def _flush(x: Array) -> Array:
    """Subnormals to zero of the same sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def fma_flushed(a: Array, b: Array, c: Array) -> Array:
    """The fma of R1: subnormal operands read as zero, and so does a result that is subnormal once rounded."""
    with np.errstate(all="ignore"):
        total = _odd_sum(_flush(a), _flush(b), _flush(c))
        # tiny after rounding: judged with the exponent range of fp32 moved out of the way
        tiny = np.abs((total * 2.0**100).astype(F32)) < F32(2.0**-26)
        return np.where(tiny, np.copysign(F32(0), total), total.astype(F32)).astype(F32)


def bf16(x: Array) -> Array:
    """Round fp32 to bf16 (nearest even, subnormals kept), returned as fp32; every NaN becomes 0x7fc0."""
    u = _view(np.asarray(x, dtype=F32), np.uint32).astype(np.uint64)
    r = ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FC00000), r).astype(np.uint32).view(F32)


def _poly(coefficients: tuple[str, ...], x: Array) -> Array:
    p = np.full_like(x, F32(float.fromhex(coefficients[-1])))
    for c in reversed(coefficients[:-1]):
        p = fma(p, x, F32(float.fromhex(c)))
    return p


LOG2E = F32(float.fromhex(contract.LOG2E))
LN2 = F32(float.fromhex(contract.LN2))


def exp2(x: Array | F32) -> Array:
    """2^x: 1 at 0, 0 below -150, inf above 128; one rounding even into subnormals."""
    x = np.asarray(x, dtype=F32)
    with np.errstate(all="ignore"):
        y = np.minimum(np.maximum(x, F32(-160)), F32(130))
        n = np.rint(y)
        f = (y - n).astype(F32)
        p = fma(_poly(contract.EXP2_POLY, f), f, F32(1)).astype(np.float64)
        return np.where(np.isnan(x), F32(np.nan), np.ldexp(p, np.where(np.isnan(n), 0, n).astype(np.int64)).astype(F32))


def log2(x: Array | F32) -> Array:
    """log2(x): -inf at 0, NaN below, subnormals kept."""
    x = np.asarray(x, dtype=F32)
    with np.errstate(all="ignore"):
        tiny = x < F32(2.0**-126)
        y = np.where(tiny, x * F32(2.0**24), x).astype(F32)
        bits = _view(y, np.int32).astype(np.int64)
        e = (bits - 0x3F3504F3) >> 23
        m = _view((bits - (e << 23)).astype(np.int32), F32)
        t = (m - F32(1)).astype(F32)
        r = fma(t, _poly(contract.LOG2_POLY, t), (e + np.where(tiny, -24, 0)).astype(F32))
        r = np.where(x == 0, F32(-np.inf), r)
        r = np.where(x == np.inf, x, r)
        return np.where(x >= 0, r, F32(np.nan)).astype(F32)


def fold(lanes: Array) -> Any:
    """Halving tree over the last axis (a power of two)."""
    t = lanes.copy()
    while t.shape[-1] > 1:
        half = t.shape[-1] // 2
        t = (t[..., :half] + t[..., half:]).astype(F32)
    return t[..., 0]


def lane_reduce(n: int, step: Callable[[Array, slice, slice], None]) -> Any:
    """R3: step(lanes, lane slice, element slice) for each group of 128 elements, then :func:`fold`."""
    lanes = np.zeros(contract.REDUCTION_LANES, dtype=F32)
    for start in range(0, n, contract.REDUCTION_LANES):
        end = min(n, start + contract.REDUCTION_LANES)
        step(lanes, slice(0, end - start), slice(start, end))
    return fold(lanes)


def chain(a: Array, b: Array, start: Array | None = None) -> Array:
    """R1: ``a [M, K] @ b [K, N]``, from ``start`` or +0: per output one chain over pairs of k, odd k first."""
    acc = np.zeros((a.shape[0], b.shape[1]), dtype=F32) if start is None else start.astype(F32)
    if a.shape[1] % 2:
        a, b = np.pad(a, ((0, 0), (0, 1))), np.pad(b, ((0, 1), (0, 0)))
    for k in range(0, a.shape[1], 2):
        for i in (k + 1, k):
            acc = fma_flushed(a[:, i : i + 1], b[i : i + 1, :], acc)
    return acc
