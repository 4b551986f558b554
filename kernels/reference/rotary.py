"""Rotary embedding in scalar order (R7)."""

from __future__ import annotations

from .arith import F32, Array, bf16, fma


def rotary(x: Array, positions: Array, table: Array, *, interleaved: bool = False, inverse: bool = False) -> Array:
    """x [T, heads, D]; table [positions, rotary_dim] of cosines then sines. Pairs (2i, 2i + 1), or (i, i + half)."""
    turned = table.shape[1]
    half = turned // 2
    low, high = (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(0, half), slice(half, turned))
    c, s = table[positions, None, :half], table[positions, None, half:]
    s = -s if inverse else s
    a, b = x[..., low], x[..., high]
    y = x.copy()
    y[..., low] = bf16(fma(a, c, -(b * s).astype(F32)))
    y[..., high] = bf16(fma(b, c, (a * s).astype(F32)))
    return y
