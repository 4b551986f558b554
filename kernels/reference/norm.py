"""RMSNorm, forward and backward, in scalar order (R3, R7, R9)."""

from __future__ import annotations

import numpy as np

from .arith import F32, Array, bf16, fma, lane_reduce


def _inverse_rms(x: Array, eps: float) -> F32:
    def step(lanes: Array, lane: slice, at: slice) -> None:
        lanes[lane] = fma(x[at], x[at], lanes[lane])

    mean = lane_reduce(len(x), step) / F32(len(x))
    return F32(1) / np.sqrt(mean + F32(eps))


def rms_norm(x: Array, w: Array, eps: float, residual: Array | None = None) -> tuple[Array, Array]:
    """x [rows, n]: (y, s), s the rounded sum with the residual (x itself without one)."""
    s = x if residual is None else bf16((x + residual).astype(F32))
    y = np.stack([((row * _inverse_rms(row, eps)).astype(F32) * w).astype(F32) for row in s])
    return bf16(y), s


def rms_norm_backward(s: Array, w: Array, eps: float, dy: Array, ds: Array | None, dw: Array) -> tuple[Array, Array]:
    """(dx, dw) for the normed rows s; ds is the gradient of s from its other use."""
    dx, dw = np.empty_like(s), dw.copy()
    n = s.shape[1]
    for r, row in enumerate(s):
        inv = _inverse_rms(row, eps)
        g = (dy[r] * w).astype(F32)

        def step(lanes: Array, lane: slice, at: slice, g: Array = g, row: Array = row) -> None:
            lanes[lane] = fma(g[at], row[at], lanes[lane])

        c = ((lane_reduce(n, step) * inv) * inv) * inv / F32(n)
        d = fma(row, -c, (g * inv).astype(F32))
        dx[r] = d if ds is None else (d + ds[r]).astype(F32)
        dw = fma(dy[r], (row * inv).astype(F32), dw)
    return bf16(dx), dw
