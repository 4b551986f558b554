"""Rotary embedding, half style, in scalar order (R7)."""

from __future__ import annotations

from .arith import F32, Array, bf16, fma


def rotary(x: Array, positions: Array, table: Array, *, inverse: bool = False) -> Array:
    """x [T, heads, D]; table [positions, rotary_dim] of cosines then sines."""
    half = table.shape[1] // 2
    c, s = table[positions, None, :half], table[positions, None, half:]
    s = -s if inverse else s
    a, b = x[..., :half], x[..., half : 2 * half]
    y = x.copy()
    y[..., :half] = fma(a, c, -(b * s).astype(F32))
    y[..., half : 2 * half] = fma(b, c, (a * s).astype(F32))
    return bf16(y)
