"""SwiGLU, forward and backward, in scalar order (R4, R7)."""

from __future__ import annotations

import numpy as np

from .arith import F32, LOG2E, Array, bf16, exp2, fma, lane_reduce

ONE = F32(1)


def _hidden(x: Array) -> tuple[Array, Array, Array, Array]:
    """(g, u, 1 + exp(-g), g / (1 + exp(-g)) u)"""
    g, u = np.split(x, 2, axis=-1)
    d = ONE + exp2((g * -LOG2E).astype(F32))
    return g, u, d, ((g / d).astype(F32) * u).astype(F32)


def silu_and_mul(x: Array, row_weight: Array | None = None) -> Array:
    """x [rows, 2 n] = gate | up, row_weight fp32 [rows]."""
    h = _hidden(x)[3]
    return bf16(h if row_weight is None else (h * row_weight[:, None]).astype(F32))


def silu_and_mul_backward(x: Array, dy: Array, row_weight: Array | None = None) -> tuple[Array, Array]:
    """(dx = dgate | dup, drow_weight)."""
    g, u, d, h = _hidden(x)
    drow = np.empty(len(x), dtype=F32)
    for r in range(len(x)):

        def step(lanes: Array, lane: slice, at: slice, r: int = r) -> None:
            lanes[lane] = fma(dy[r, at], h[r, at], lanes[lane])

        drow[r] = lane_reduce(h.shape[1], step)
    if row_weight is not None:
        dy = (dy * row_weight[:, None]).astype(F32)
    s = (ONE / d).astype(F32)
    dg = (dy * u).astype(F32) * (s * fma(g, ONE - s, ONE)).astype(F32)
    return bf16(np.concatenate([dg, dy * (g / d).astype(F32)], axis=-1).astype(F32)), drow
