"""Router, permutation, expert layers and combination, row by row in scalar order (R8, R9)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from .arith import F32, LOG2E, Array, bf16, exp2, fma, lane_reduce
from .linear import linear, linear_backward

ONE, ZERO = F32(1), F32(0)


def scores(logits: Array, scoring: str) -> Array:
    """fp32 [E] of one row: softmax (R3 sum) or sigmoid."""
    with np.errstate(all="ignore"):
        if scoring == "sigmoid":
            return (ONE / (ONE + exp2((logits * -LOG2E).astype(F32)))).astype(F32)
        top = F32(np.fmax.reduce(logits))
        e = exp2(((logits - top).astype(F32) * LOG2E).astype(F32))

        def add(lanes: Array, lane: slice, at: slice) -> None:
            lanes[lane] = lanes[lane] + e[at]

        return (e / lane_reduce(len(e), add)).astype(F32)


def _descending(x: Array) -> Array:
    """Indices by (value descending, index ascending); NaN last."""
    return np.lexsort((np.arange(len(x)), np.where(np.isnan(x), np.inf, -x), np.isnan(x)))


def select(chosen: Array, k: int, groups: tuple[int, int, int] | None) -> Array:
    """The k experts of one row by their selection scores; groups = (count, keep, how many scores judge a group)."""
    allowed = np.ones(len(chosen), dtype=bool)
    if groups is not None:
        count, keep, judges = groups
        parts = chosen.reshape(count, -1)
        judged = np.zeros(count, dtype=F32)
        for g, part in enumerate(parts):
            for i in _descending(part)[:judges]:
                judged[g] = F32(judged[g] + part[i])
        allowed = np.isin(np.arange(count), _descending(judged)[:keep]).repeat(parts.shape[1])
    return np.array([i for i in _descending(chosen) if allowed[i]][:k])


def router_row(
    logits: Array,
    k: int,
    *,
    scoring: str,
    groups: tuple[int, int, int] | None = None,
    bias: Array | None = None,
    replay: Array | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """(weights fp32 [k], expert indices [k]) of one row of fp32 logits."""
    p = scores(logits, scoring)
    indices = select(p if bias is None else (p + bias).astype(F32), k, groups) if replay is None else replay
    w = p[indices]
    with np.errstate(all="ignore"):
        if renormalize:
            w = (w / _chain_sum(w)).astype(F32)
        return (w * F32(scale)).astype(F32), indices


def _chain_sum(w: Array) -> F32:
    total: Any = ZERO
    for x in w:
        total = F32(total + x)
    return total


def router_row_gradient(
    logits: Array, indices: Array, dw: Array, *, scoring: str, renormalize: bool = True, scale: float = 1.0
) -> Array:
    """d logits fp32 [E] of one row; the choice of experts is constant."""
    p = scores(logits, scoring)
    chosen = p[indices]
    dp = (dw * F32(scale)).astype(F32)
    if renormalize:
        total = _chain_sum(chosen)
        dp = ((dp - _dot(dp, (chosen / total).astype(F32))).astype(F32) / total).astype(F32)
    if scoring == "sigmoid":
        out = np.zeros_like(p)
        out[indices] = dp * (chosen * (ONE - chosen)).astype(F32)
        return out
    spread = np.zeros_like(p)
    spread[indices] = dp
    return (p * (spread - _dot(dp, chosen)).astype(F32)).astype(F32)


def _dot(a: Array, b: Array) -> Any:
    total: Any = ZERO
    for x, y in zip(a, b, strict=True):
        total = fma(x, y, total)
    return total


def permute(indices: Array, experts: int) -> tuple[Array, Array, Array]:
    """(offsets [E + 1], source [T k], position [T, k]): rows ordered by (expert, token, slot)."""
    source = np.argsort(indices.reshape(-1), kind="stable")
    position = np.empty(indices.size, dtype=np.int64)
    position[source] = np.arange(indices.size)
    offsets = np.searchsorted(indices.reshape(-1)[source], np.arange(experts + 1))
    return offsets, source, position.reshape(indices.shape)


def permute_backward(dy: Array, position: Array) -> Array:
    """dx [T, n]: each token's rows added in slot order."""
    total = np.zeros((len(position), dy.shape[1]), dtype=F32)
    for s in range(position.shape[1]):
        total = (total + dy[position[:, s]]).astype(F32)
    return bf16(total)


def combine(y: Array, position: Array, weights: Array, shared: Array | None = None) -> Array:
    """Per token: fma chain over slots, the shared expert's output last, one rounding."""
    total = np.zeros((len(position), y.shape[1]), dtype=F32)
    for s in range(position.shape[1]):
        total = fma(weights[:, s : s + 1], y[position[:, s]], total)
    return bf16(total if shared is None else (total + shared).astype(F32))


def combine_backward(y: Array, position: Array, weights: Array, dout: Array) -> tuple[Array, Array]:
    """(dy, dweights): dy = w dout, dweights the R3 sum of fma(dout, y, lane)."""
    dy, dw = np.zeros_like(y), np.empty_like(weights)
    for t, slots in enumerate(position):
        for s, at in enumerate(slots):
            dy[at] = weights[t, s] * dout[t]

            def step(lanes: Array, lane: slice, part: slice, t: int = t, at: int = at) -> None:
                lanes[lane] = fma(dout[t, part], y[at, part], lanes[lane])

            dw[t, s] = lane_reduce(y.shape[1], step)
    return bf16(dy), dw


def grouped_linear(x: Array, w: Array, offsets: Array, *, segments: int = 1, round_output: bool = True) -> Array:
    """Rows [offsets[e], offsets[e + 1]) of x by w[e]."""
    options: dict[str, Any] = {"segments": segments, "round_output": round_output}
    return np.concatenate([linear(x[a:b], w[e], **options) for e, (a, b) in enumerate(pairwise(offsets))])


def grouped_linear_backward(x: Array, w: Array, offsets: Array, dy: Array, dw: Array) -> tuple[Array, Array]:
    """(dx, dw) expert by expert."""
    parts = [linear_backward(x[a:b], w[e], dy[a:b], dw[e]) for e, (a, b) in enumerate(pairwise(offsets))]
    return np.concatenate([p[0] for p in parts]), np.stack([p[1] for p in parts])
