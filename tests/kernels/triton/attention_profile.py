"""Attention by profile ``sm90-bf16`` (R5, R9) with R1 chains for matrix steps over whole matrices: bits, not closeness.

What the interpreter computes, said a second time: probabilities and ds are rounded once to bf16 before their products.
One sequence, arguments as in ``kernels/reference/attention.py``, finite values alone. Slots that are not seen enter
products as +0, which changes nothing, so no block is skipped here.
"""

import numpy as np

from zerokl.kernels.reference import attention as scalar
from zerokl.kernels.reference.arith import F32, LOG2E, bf16, chain, exp2, fma, fold, log2


def _seen(n, causal, window):
    query, key = np.arange(n)[:, None], np.arange(n)[None, :]
    return (key <= query + (0 if causal else n)) & (key > query - (window or n))


def _segment(q, k, v, seen, c, first):
    """(m, l, o) of every row after the blocks of the segment that starts at key ``first``."""
    m, mass, o = np.full(len(q), -np.inf, F32), np.zeros(len(q), F32), np.zeros((len(q), v.shape[1]), F32)
    for block in range(first, min(first + scalar.SEGMENT, len(k)), scalar.BLOCK):
        keys = slice(block, block + scalar.BLOCK)
        rows = np.flatnonzero(seen[:, keys].any(1))
        t = np.where(seen[rows, keys], (chain(q[rows], k[keys].T) * c).astype(F32), F32(-np.inf))
        top = np.maximum(m[rows], t.max(1))
        p = np.zeros((len(rows), scalar.BLOCK), F32)
        p[:, : t.shape[1]] = exp2(t - top[:, None])
        shrink = exp2(m[rows] - top)
        m[rows], mass[rows] = top, fma(mass[rows], shrink, fold(p))
        o[rows] = chain(bf16(p[:, : t.shape[1]]), v[keys], o[rows] * shrink[:, None])
    return m, mass, o


def _head(q, k, v, seen, c, sink):
    """(fp32 output [n, Dv], lse [n]) of one head."""
    m, mass, o = _segment(q, k, v, seen, c, 0)
    for first in range(scalar.SEGMENT, len(k), scalar.SEGMENT):
        m2, mass2, o2 = _segment(q, k, v, seen, c, first)
        rows = np.flatnonzero(mass2)
        top = np.maximum(m[rows], m2[rows])
        a, b = exp2(m[rows] - top), exp2(m2[rows] - top)
        m[rows], mass[rows] = top, fma(mass[rows], a, mass2[rows] * b)
        o[rows] = fma(o[rows], a[:, None], o2[rows] * b[:, None])
    if sink is not None:
        joining = F32(F32(sink) * LOG2E)
        top = np.maximum(m, joining)
        a = exp2(m - top)
        m, mass, o = top, fma(mass, a, exp2(joining - top)), o * a[:, None]
    return o / mass[:, None], m + log2(mass)


def attention(q, k, v, *, scale, causal=True, window=0, sinks=None):
    """(bf16 output [n, H, Dv], lse [n, H])."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    seen, c = _seen(len(q), causal, window), F32(scale) * LOG2E
    parts = [
        _head(q[:, h], k[:, h // group], v[:, h // group], seen, c, None if sinks is None else sinks[h])
        for h in range(heads)
    ]
    return bf16(np.stack([out for out, _ in parts], 1)), np.stack([lse for _, lse in parts], 1)


def attention_backward(q, k, v, out, lse, dout, *, scale, causal=True, window=0):
    """(dq, dk, dv), rows of a key head query-major, then head of the group."""
    n, heads, _ = q.shape
    group, c = heads // k.shape[1], F32(scale) * LOG2E
    seen = _seen(n, causal, window).repeat(group, 0)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for kv in range(k.shape[1]):
        own = slice(kv * group, (kv + 1) * group)
        queries, outs, douts = (x[:, own].reshape(n * group, -1) for x in (q, out, dout))
        delta = np.array([scalar._delta(*row) for row in zip(outs, douts, strict=True)], F32)[:, None]
        p = exp2((chain(queries, k[:, kv].T) * c - lse[:, own].reshape(-1, 1)).astype(F32))
        ds = (p * (chain(douts, v[:, kv].T) - delta)).astype(F32) * F32(scale)
        p, ds = bf16(np.where(seen, p, 0)), bf16(np.where(seen, ds, 0))
        dq[:, own] = chain(ds, k[:, kv]).reshape(n, group, -1)
        dk[:, kv], dv[:, kv] = chain(ds.T, queries), chain(p.T, douts)
    return bf16(dq), bf16(dk), bf16(dv)
