"""Selected log-probabilities, entropy and their gradient, row by row in scalar order (R6, R9)."""

from __future__ import annotations

import numpy as np

from .. import contract
from .arith import F32, LN2, LOG2E, Array, bf16, chain, exp2, fma, lane_reduce, log2

SEGMENTS = contract.VOCAB_SEGMENTS
Sum = tuple[F32, F32, F32]


def _exp(x: Array | F32) -> Array:
    return exp2((x * LOG2E).astype(F32))


def _segment(z: Array) -> Sum:
    m = F32(z.max()) if len(z) else F32(-np.inf)
    if m == -np.inf:
        return m, F32(0), F32(0)

    def add(lanes: Array, lane: slice, at: slice) -> None:
        lanes[lane] = lanes[lane] + _exp((z[at] - m).astype(F32))

    def add_moment(lanes: Array, lane: slice, at: slice) -> None:
        x = (z[at] - m).astype(F32)
        e = _exp(x)
        lanes[lane] = np.where(e > 0, fma(e, x, lanes[lane]), lanes[lane])

    with np.errstate(all="ignore"):
        return m, lane_reduce(len(z), add), lane_reduce(len(z), add_moment)


def _merge(a: Sum, b: Sum) -> Sum:
    m = max(a[0], b[0])
    parts = []
    for top, total, moment in (a, b):
        d = F32(top - m) if top > -np.inf else F32(0)
        e = F32(_exp(d)) if top > -np.inf else F32(0)
        parts.append((F32(total * e), F32(e * fma(total, d, moment)) if e else F32(0)))
    return m, parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def softmax_sum(z: Array) -> Sum:
    """(maximum, sum of exp(z - maximum), moment): 8 segments, then a balanced tree."""
    width = -(-len(z) // SEGMENTS)
    sums = [_segment(z[g * width : (g + 1) * width]) for g in range(SEGMENTS)]
    while len(sums) > 1:
        sums = [_merge(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def keep(z: Array, top_p: float, top_k: int) -> Array:
    """z with what top-k and top-p drop set to -inf; order (z descending, index ascending), mass added in that order."""
    if top_p >= 1 and (top_k <= 0 or top_k >= len(z)):
        return z
    m, total, _ = softmax_sum(z)
    e, limit = _exp((z - m).astype(F32)), F32(top_p) * total
    kept = np.full_like(z, -np.inf)
    mass = F32(0)
    for rank, i in enumerate(np.lexsort((np.arange(len(z)), -z))):
        if rank > 0 and ((top_p < 1 and not mass < limit) or (top_k > 0 and rank >= top_k)):
            break
        kept[i] = z[i]
        mass = F32(mass + e[i])
    return kept


def logprob_row(
    logits: Array, target: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[F32, F32]:
    """(log-probability of target, entropy) of one row of fp32 logits."""
    z = keep((logits / F32(temperature)).astype(F32), top_p, top_k)
    m, total, moment = softmax_sum(z)
    log_total = F32(log2(total) * LN2)
    return F32(F32(z[target] - m) - log_total), F32(log_total - F32(moment / total))


def hidden_gradient(dz: Array, w: Array) -> Array:
    """d hidden fp32 of rows of d logits: R1 over each segment of the vocabulary, segments added as a balanced tree."""
    width = -(-len(w) // SEGMENTS)
    parts = [chain(dz[:, g * width : (g + 1) * width], w[g * width : (g + 1) * width]) for g in range(SEGMENTS)]
    while len(parts) > 1:
        parts = [(a + b).astype(F32) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def logits_gradient(
    logits: Array, target: int, grad: float, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Array:
    """d logits of one row, rounded once to bf16: grad (1[target] - p) / temperature."""
    z = keep((logits / F32(temperature)).astype(F32), top_p, top_k)
    m, total, _ = softmax_sum(z)
    p = (_exp((z - m).astype(F32)) / total).astype(F32)
    hit = (np.arange(len(z)) == target).astype(F32)
    return bf16(((F32(grad) * (hit - p)).astype(F32) / F32(temperature)).astype(F32))
