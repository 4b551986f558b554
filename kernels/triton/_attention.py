"""Building blocks of the attention kernels (R5, R9), profile ``sm90-bf16``: tiles, a segment of keys, merge, sink.

q.k and p.v are matrix products: chains of ascending k, the probabilities rounded once to bf16 for p.v, not for their
sum. exp2 is the polynomial. Blocks, segments, their merge and the halving tree are those of every profile. Head dims
are constants of a kernel: D and DV, padded with zeros to the powers of two D_PAD and DV_PAD, which adds whole steps.

A tile is ROWS rows of one sequence and key head, query-major, then head of the group. The key blocks its rows do not
see are skipped; in a block that some of them see, the others keep their state untouched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from ._math import LOG2E, exp2, fold, to_bf16

BLOCK = tl.constexpr(contract.ATTENTION_BLOCK)
_INF = tl.constexpr(float("inf"))


def score_factor(scale: float) -> float:
    """scale * log2e, rounded to fp32 as R5 has it."""
    return float(torch.tensor(scale, dtype=torch.float32) * float.fromhex(contract.LOG2E))


def head_dims(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """The constants D, D_PAD, DV, DV_PAD of a launch."""
    d, dv = q.shape[-1], v.shape[-1]
    pad, v_pad = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
    return {"D": d, "D_PAD": pad, "DV": dv, "DV_PAD": v_pad}


@triton.jit
def find_tile(start_ptr, sequences, per_row, size):
    """(sequence, tile in it) of this program: the tiles of ``size`` rows of all sequences are numbered through.

    ``start_ptr`` int32 [sequences + 1]. The sequence is ``sequences`` for a program behind the last tile.
    """
    tile = tl.program_id(0)
    sequence = 0
    count = tl.cdiv((tl.load(start_ptr + 1) - tl.load(start_ptr)) * per_row, size)
    while (sequence < sequences) & (tile >= count):
        tile -= count
        sequence += 1
        more = sequence < sequences
        begin = tl.load(start_ptr + sequence, mask=more, other=0)
        count = tl.cdiv((tl.load(start_ptr + sequence + 1, mask=more, other=0) - begin) * per_row, size)
    return sequence, tile


@triton.jit
def visible(position, keys, CAUSAL: tl.constexpr, window):
    """[begin, end) of the keys a query at ``position`` sees."""
    end = position + 1 if CAUSAL else tl.zeros_like(position) + keys
    begin = tl.where((window > 0) & (position + 1 > window), position + 1 - window, 0)
    return begin, end


@triton.jit
def rows_of_tile(
    sequence,
    tile,
    start_ptr,
    length_ptr,
    kv_heads,
    group,
    window,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile's rows of key head program_id(1): (first packed row of the sequence, its keys), then by row [ROWS] (index
    into [T, H], real, begin, end), the keys it sees being [begin, end). A row that is not real sees none.

    PAGED: the sequence has length [B] keys, its queries are the last; otherwise as many keys as queries.
    """
    first = tl.load(start_ptr + sequence).to(tl.int64)
    queries = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    keys = tl.load(length_ptr + sequence) if PAGED else queries
    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // group
    real = query < queries
    begin, end = visible(keys - queries + query, keys, CAUSAL, window)
    index = (first + query) * (kv_heads * group) + tl.program_id(1) * group + row % group
    return first, keys, index, real, tl.where(real, begin, keys), tl.where(real, end, 0)


@triton.jit
def only_finite(value):
    """(value [N, D] with zeros for what is not finite, which of its rows held such a thing [N])."""
    bits = value.to(tl.uint16, bitcast=True)
    special = (bits & 0x7F80) == 0x7F80
    bad = tl.max(special.to(tl.int32), axis=1) > 0
    return tl.where(special, 0, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True), bad


@triton.jit
def add_weighted(weight, seen, value, bad, acc):
    """acc [R, D] + bf16(weight [R, N]) value [N, D], value and bad from :func:`only_finite`.

    A row that sees a bad value becomes NaN, for such a value's weight does; one that does not stays clean (R0), where
    0 NaN would be NaN. A row whose weights are all 0 keeps its acc: a step of zeros adds nothing (R1).
    """
    weight = tl.where(seen & bad[None, :], float("nan"), weight)
    return tl.dot(to_bf16(weight), value, acc)


@triton.jit
def load_rows(ptr, row, mask, DIM: tl.constexpr, PAD: tl.constexpr):
    """[R, PAD]: the DIM elements of each ``row``; zeros past them and where the mask [R] is off."""
    d = tl.arange(0, PAD)[None, :]
    return tl.load(ptr + row[:, None] * DIM + d, mask=mask[:, None] & (d < DIM), other=0.0)


@triton.jit
def store_rows(ptr, row, value, mask, DIM: tl.constexpr, PAD: tl.constexpr):
    """DIM elements of value [R, PAD] to each ``row``, one rounding to bf16."""
    d = tl.arange(0, PAD)[None, :]
    tl.store(ptr + row[:, None] * DIM + d, to_bf16(value), mask=mask[:, None] & (d < DIM))


@triton.jit
def empty_state(ROWS: tl.constexpr, DV_PAD: tl.constexpr):
    """(maximum, sum, output) before any key."""
    m = tl.full((ROWS,), -_INF, tl.float32)
    return m, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DV_PAD), tl.float32)


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    keys,
    kv_heads,
    begin,
    end,
    start,
    stop,
    c,
    page_size,
    PAGED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """The state of q [ROWS, D_PAD] after its keys of the blocks from ``start`` to before ``stop``, within one segment.

    Keys lie at row ``first`` of k and v on, or, PAGED, at page table[p // page_size] of a sequence of ``keys`` keys.
    """
    kv = tl.program_id(1)
    m, mass, o = empty_state(ROWS, DV_PAD)
    for block in range(start, stop, BLOCK):
        key = block + tl.arange(0, BLOCK)
        there = key < keys
        if PAGED:
            page = tl.load(table_ptr + key // page_size, mask=there, other=0)
            slot = page.to(tl.int64) * page_size + key % page_size
        else:
            slot = first + key
        slot = slot * kv_heads + kv
        k = load_rows(k_ptr, slot, there, D, D_PAD)
        v, bad = only_finite(load_rows(v_ptr, slot, there, DV, DV_PAD))
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        any_seen = (block < end) & (block + BLOCK > begin)
        t = tl.where(seen, tl.dot(q, tl.trans(k)) * c, -_INF)
        top = tl.maximum(m, tl.max(t, axis=1))
        # a row that sees none of the block keeps its state: it shrinks by exactly 1 and adds zeros
        base = tl.where(any_seen | (top != -_INF), top, 0.0)
        shrink = exp2(m - base)
        p = exp2(t - base[:, None])
        mass = tl.fma(mass, shrink, fold(p, ROWS, BLOCK))
        o = add_weighted(p, seen, v, bad, o * shrink[:, None])
        m = top
    return m, mass, o


@triton.jit
def merge(m, mass, o, m2, mass2, o2):
    """Two states under one maximum M: (M, l e(m - M) + l' e(m' - M), o alike). An empty second changes nothing."""
    top = tl.maximum(m, m2)
    base = tl.where(top == -_INF, 0.0, top)
    a = exp2(m - base)
    b = exp2(m2 - base)
    empty = (m2 == -_INF) & (mass2 == 0.0)
    mass = tl.where(empty, mass, tl.fma(mass, a, mass2 * b))
    o = tl.where(empty[:, None], o, tl.fma(o, tl.broadcast_to(a[:, None], o.shape), o2 * b[:, None]))
    return top, mass, o


@triton.jit
def add_sink(sink, m, mass, o):
    """A logit per row that joins the sum without a value, after the last segment."""
    t = sink * LOG2E
    top = tl.maximum(m, t)
    a = exp2(m - top)
    return top, tl.fma(mass, a, exp2(t - top)), o * a[:, None]


@triton.jit
def divide(o, mass):
    """o / l by rows."""
    return tl.div_rn(o, tl.broadcast_to(mass[:, None], o.shape))
