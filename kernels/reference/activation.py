"""SwiGLU, forward and backward, in scalar order (R4, R7)."""

from __future__ import annotations

import numpy as np

from .arith import F32, LOG2E, Array, bf16, exp2, fma

ONE = F32(1)


def silu_and_mul(x: Array) -> Array:
    """x [rows, 2 n] = gate | up."""
    g, u = np.split(x, 2, axis=-1)
    return bf16((g / (ONE + exp2((g * -LOG2E).astype(F32)))).astype(F32) * u)


def silu_and_mul_backward(x: Array, dy: Array) -> Array:
    """dx = dgate | dup."""
    g, u = np.split(x, 2, axis=-1)
    d = ONE + exp2((g * -LOG2E).astype(F32))
    s = (ONE / d).astype(F32)
    dg = (dy * u).astype(F32) * (s * fma(g, ONE - s, ONE)).astype(F32)
    return bf16(np.concatenate([dg, dy * (g / d).astype(F32)], axis=-1).astype(F32))
