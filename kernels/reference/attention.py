"""Attention, forward and backward, row by row in scalar order (R5, R9)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import contract
from .arith import F32, LOG2E, Array, bf16, chain, exp2, fma, fold, log2

BLOCK, SEGMENT = contract.ATTENTION_BLOCK, contract.ATTENTION_SEGMENT


def _dot(a: Array, b: Array) -> Array:
    """a [D] . b [n, D] by R1."""
    return chain(a[None], b.T)[0]


def attend_row(
    q: Array, k: Array, v: Array, begin: int, end: int, scale: float, sink: float | None = None
) -> tuple[Array, F32]:
    """One query q [D] over keys [begin, end) of k [n, D], v [n, Dv]: (fp32 output, log2-sum-exp2)."""
    c = F32(scale) * LOG2E
    total_m: Any
    total_l: Any
    m: Any
    mass: Any
    total_m, total_l, total_o = F32(-np.inf), F32(0), np.zeros(v.shape[1], dtype=F32)
    for segment in range(begin // SEGMENT * SEGMENT, end, SEGMENT):
        m, mass, o = F32(-np.inf), F32(0), np.zeros(v.shape[1], dtype=F32)
        for block in range(segment, min(segment + SEGMENT, end), BLOCK):
            keys = np.arange(max(block, begin), min(block + BLOCK, end))
            if len(keys) == 0:
                continue
            t = (_dot(q, k[keys]) * c).astype(F32)
            top = max(m, t.max())
            shrink = exp2(m - top)
            p = np.zeros(BLOCK, dtype=F32)
            p[keys - block] = exp2((t - top).astype(F32))
            m, mass, o = top, fma(mass, shrink, fold(p)), (o * shrink).astype(F32)
            for key in keys:
                o = fma(p[key - block], v[key], o)
        if mass == 0 and m == -np.inf:
            continue
        top = max(total_m, m)
        a, b = exp2(total_m - top), exp2(m - top)
        total_m, total_l = top, fma(total_l, a, mass * b)
        total_o = fma(total_o, a, (o * b).astype(F32))
    if sink is not None:
        joining = F32(sink) * LOG2E
        top = max(total_m, joining)
        a = exp2(total_m - top)
        total_m, total_l, total_o = top, fma(total_l, a, exp2(joining - top)), (total_o * a).astype(F32)
    return (total_o / total_l).astype(F32), F32(total_m + log2(total_l))


def _visible(position: int, length: int, causal: bool, window: int) -> tuple[int, int]:
    end = position + 1 if causal else length
    return (max(0, position + 1 - window) if window else 0), end


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    before: int = 0,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """One sequence: q [n, H, D] at positions ``before + i``, k [m, Hk, D], v [m, Hk, Dv]. (bf16 output, lse [n, H])."""
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = np.empty((n, heads, v.shape[2]), dtype=F32), np.empty((n, heads), dtype=F32)
    for i in range(n):
        begin, end = _visible(before + i, k.shape[0], causal, window)
        for h in range(heads):
            sink = None if sinks is None else sinks[h]
            out[i, h], lse[i, h] = attend_row(q[i, h], k[:, h // group], v[:, h // group], begin, end, scale, sink)
    return bf16(out), lse


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dout: Array,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of one sequence: dq over ascending keys, dk and dv over ascending (query, head)."""
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    c = F32(scale) * LOG2E
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for i in range(n):
        begin, end = _visible(i, n, causal, window)
        for h in range(heads):
            kv, see = h // group, slice(begin, end)
            delta = _delta(out[i, h], dout[i, h])
            p, ds = _score_gradients(q[i, h], k[see, kv], v[see, kv], delta, lse[i, h], dout[i, h], c, scale)
            for j in range(begin, end):
                dq[i, h] = fma(ds[j - begin], k[j, kv], dq[i, h])
            dk[see, kv] = fma(ds[:, None], q[i, h][None], dk[see, kv])
            dv[see, kv] = fma(p[:, None], dout[i, h][None], dv[see, kv])
    return bf16(dq), bf16(dk), bf16(dv)


def sink_gradient(out: Array, lse: Array, dout: Array, sinks: Array) -> Array:
    """dsinks [H] of packed sequences out, dout [T, H, Dv], lse [T, H]: over ascending tokens."""
    total = np.zeros(len(sinks), dtype=F32)
    for t in range(len(out)):
        for h in range(len(sinks)):
            p = exp2(F32(F32(sinks[h]) * LOG2E - lse[t, h]))
            total[h] = total[h] - F32(p * _delta(out[t, h], dout[t, h]))
    return total


def _delta(out: Array, dout: Array) -> Any:
    delta: Any = F32(0)
    for d in range(out.shape[0]):
        delta = fma(dout[d], out[d], delta)
    return delta


def _score_gradients(
    q: Array, k: Array, v: Array, delta: F32, lse: F32, dout: Array, c: F32, scale: float
) -> tuple[Array, Array]:
    p = exp2(((_dot(q, k) * c).astype(F32) - lse).astype(F32))
    ds = ((p * (_dot(dout, v) - delta).astype(F32)).astype(F32) * F32(scale)).astype(F32)
    return p, ds
