"""Linear and embedding, forward and backward, in scalar order (R1, R2, R9)."""

from __future__ import annotations

import numpy as np

from .arith import F32, Array, bf16, chain


def linear(x: Array, w: Array, bias: Array | None = None, *, segments: int = 1, round_output: bool = True) -> Array:
    """x [M, K], w [N, K]: y [M, N]."""
    depth = x.shape[1] // segments
    parts = [chain(x[:, g * depth : (g + 1) * depth], w[:, g * depth : (g + 1) * depth].T) for g in range(segments)]
    while len(parts) > 1:
        parts = [(a + b).astype(F32) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    y = parts[0] if bias is None else (parts[0] + bias).astype(F32)
    return bf16(y) if round_output else y


def linear_backward(x: Array, w: Array, dy: Array, dw: Array) -> tuple[Array, Array]:
    """(dx, dw): dx chains over ascending n, dw continues over ascending rows."""
    return bf16(chain(dy, w)), chain(dy.T, x, dw)


def embedding(ids: Array, w: Array) -> Array:
    """Rows of w."""
    return w[ids]


def embedding_backward(ids: Array, dy: Array, dw: Array) -> Array:
    """dw with each token's gradient added in order."""
    out = dw.copy()
    for t, i in enumerate(ids):
        out[i] = (out[i] + dy[t]).astype(np.float32)
    return out
