"""Counter-based Gumbel-max sampling of one row (R0, R6)."""

from __future__ import annotations

import numpy as np

from .arith import F32, LN2, Array, log2
from .logprob import keep

MASK = 0xFFFFFFFF


def mix(x: Array) -> Array:
    """The 32-bit integer hash "lowbias32" (Wellons), on uint64 arrays holding 32-bit values."""
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D)) & np.uint64(MASK)
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) & np.uint64(MASK)
    return x ^ (x >> np.uint64(16))


def gumbel(n: int, seed: int, position: int) -> Array:
    """The n Gumbel numbers of (seed, position), up to a constant: -ln(-log2 u)."""
    key = np.zeros(1, dtype=np.uint64)
    for i, word in enumerate((seed & MASK ^ 0x9E3779B9, (seed >> 32) & MASK, position & MASK, (position >> 32) & MASK)):
        key = mix((key if i else np.zeros_like(key)) ^ np.uint64(word))
    index = (np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B9) + key) & np.uint64(MASK)
    h = mix(mix(index) ^ key) >> np.uint64(9)
    u = (h.astype(F32) + F32(0.5)) * F32(2.0**-23)
    return -(log2(-log2(u)) * LN2).astype(F32)


def sample_row(
    logits: Array, seed: int, position: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> int:
    """The token drawn from one row of fp32 logits."""
    if temperature == 0:
        return int(np.argmax(logits))
    z = keep((logits / F32(temperature)).astype(F32), top_p, top_k)
    return int(np.argmax((z + gumbel(len(z), seed, position)).astype(F32)))
