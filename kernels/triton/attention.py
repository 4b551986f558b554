"""Attention forward over packed sequences and pages (R5), profile ``sm90-bf16``.

q.k and p.v are matrix products: chains of ascending k, the probabilities rounded once to bf16 for p.v, not for their
sum. exp2 is the polynomial. Blocks, segments, their merge and the halving tree are those of every profile.

A program owns rows of one sequence and key head, query-major, then head of the group. The key blocks its rows do not
see are skipped; in a block that some of them see, the others keep their state untouched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from ._check import refuse
from ._math import exp2, fold, launch_options, log2, to_bf16
from .attention_config import forward_config

BLOCK = tl.constexpr(contract.ATTENTION_BLOCK)
SEGMENT = tl.constexpr(contract.ATTENTION_SEGMENT)
_INF = tl.constexpr(float("inf"))


def score_factor(scale: float) -> float:
    """scale * log2e, rounded to fp32 as R5 has it."""
    return float(torch.tensor(scale, dtype=torch.float32) * float.fromhex(contract.LOG2E))


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
def add_weighted(weight, seen, value, acc):
    """acc [R, D] + bf16(weight [R, N]) value [N, D]; a row that sees a value which is not finite becomes NaN (R0).

    Without this an unseen NaN would count: its weight is 0, and 0 NaN is NaN.
    """
    bits = value.to(tl.uint16, bitcast=True)
    special = (bits & 0x7F80) == 0x7F80
    bad = tl.max(special.to(tl.int32), axis=1)
    touched = tl.max(tl.where(seen, bad[None, :], 0), axis=1)
    acc = tl.where(touched[:, None] > 0, float("nan"), acc)
    value = tl.where(special, 0, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.dot(to_bf16(weight), value, acc)


@triton.jit
def _merge(m, mass, o, m2, mass2, o2):
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
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    length_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    sequences,
    kv_heads,
    group,
    dim,
    window,
    c,
    page_size,
    max_pages,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (row tile, key head): out bf16, and unless PAGED lse fp32, of ROWS rows.

    c = scale log2e. start [B + 1] int32: first query row of each sequence. PAGED: keys lie at page
    table[b, p // page_size], length [B] of them, the queries being the last; otherwise keys are packed like queries.
    DIM: dim up to a power of two.
    """
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    kv = tl.program_id(1)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    queries = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    keys = tl.load(length_ptr + sequence) if PAGED else queries
    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // group
    real = query < queries
    begin, end = visible(keys - queries + query, keys, CAUSAL, window)
    begin = tl.where(real, begin, keys)
    end = tl.where(real, end, 0)
    d = tl.arange(0, DIM)
    index = (first + query) * (kv_heads * group) + kv * group + row % group
    at = index[:, None] * dim + d[None, :]
    inside = real[:, None] & (d < dim)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)

    total_m = tl.full((ROWS,), -_INF, tl.float32)
    total_mass = tl.zeros((ROWS,), tl.float32)
    total_o = tl.zeros((ROWS, DIM), tl.float32)
    low = tl.min(begin, axis=0)
    high = tl.max(end, axis=0)
    for segment in range(low // SEGMENT * SEGMENT, high, SEGMENT):
        m = tl.full((ROWS,), -_INF, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        o = tl.zeros((ROWS, DIM), tl.float32)
        for block in range(tl.maximum(segment, low // BLOCK * BLOCK), tl.minimum(segment + SEGMENT, high), BLOCK):
            key = block + tl.arange(0, BLOCK)
            there = key < keys
            if PAGED:
                page = tl.load(table_ptr + sequence * max_pages + key // page_size, mask=there, other=0)
                slot = page.to(tl.int64) * page_size + key % page_size
            else:
                slot = first + key
            k_at = (slot * kv_heads + kv) * dim
            k = tl.load(k_ptr + k_at[None, :] + d[:, None], mask=there[None, :] & (d < dim)[:, None], other=0.0)
            v = tl.load(v_ptr + k_at[:, None] + d[None, :], mask=there[:, None] & (d < dim)[None, :], other=0.0)
            seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
            t = tl.where(seen, tl.dot(q, k) * c, -_INF)
            top = tl.maximum(m, tl.max(t, axis=1))
            base = tl.where(top == -_INF, 0.0, top)
            shrink = exp2(m - base)
            p = exp2(t - base[:, None])
            any_seen = (block < end) & (block + BLOCK > begin)
            mass = tl.where(any_seen, tl.fma(mass, shrink, fold(p, ROWS, BLOCK)), mass)
            o = tl.where(any_seen[:, None], add_weighted(p, seen, v, o * shrink[:, None]), o)
            m = top
        total_m, total_mass, total_o = _merge(total_m, total_mass, total_o, m, mass, o)

    tl.store(out_ptr + at, to_bf16(tl.div_rn(total_o, tl.broadcast_to(total_mass[:, None], (ROWS, DIM)))), mask=inside)
    if not PAGED:
        tl.store(lse_ptr + index, total_m + log2(total_mass), mask=real)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    table: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> None:
    rows, heads, dim = q.shape
    kv_heads, sequences = k.shape[-2], start.shape[0] - 1
    group = heads // kv_heads
    if rows == 0:
        return
    config = forward_config(rows * group // sequences, dim)
    grid = (triton.cdiv(rows * group, config.rows) + sequences, kv_heads)
    attention_kernel[grid](
        q,
        k,
        v,
        start,
        length,
        start if table is None else table,
        out,
        out if lse is None else lse,
        sequences,
        kv_heads,
        group,
        dim,
        window,
        score_factor(scale),
        1 if table is None else k.shape[1],
        0 if table is None else table.shape[1],
        PAGED=table is not None,
        CAUSAL=causal,
        ROWS=config.rows,
        DIM=max(16, triton.next_power_of_2(dim)),
        **launch_options(config.num_warps, config.num_stages),
    )


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """``zerokl::attention_varlen``: q, out bf16 [T, H, D], k, v bf16 [T, Hk, D], lse fp32 [T, H]; window 0: none."""
    refuse_options("attention_varlen", q, v, sinks)
    _launch(q, k, v, cu_seqlens, cu_seqlens, None, out, lse, scale, causal, window)


def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor,
    scale: float,
    window: int,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """``zerokl::attention_paged``: caches bf16 [pages, page_size, Hk, D], contiguous; the rest int32 by sequence."""
    refuse_options("attention_paged", q, v_cache, sinks)
    pages, page_size = k_cache.shape[:2]
    check_pages(page_table, seq_lens, q_lens, pages, page_size, q.shape[0])
    start = torch.nn.functional.pad(q_lens.cumsum(0, dtype=torch.int32), (1, 0))
    _launch(q, k_cache, v_cache, start, seq_lens, page_table, out, None, scale, True, window)


def refuse_options(op: str, q: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """ValueError for what only the CPU has."""
    refuse(sinks is not None, op, "a sink")
    refuse(v.shape[-1] != q.shape[-1], op, "a value head dim other than the key's")


def check_pages(
    page_table: torch.Tensor, seq_lens: torch.Tensor, q_lens: torch.Tensor, pages: int, page_size: int, rows: int
) -> None:
    """RuntimeError, queued on the stream like check_index, unless lengths and the pages they use fit."""
    width = page_table.shape[1]
    used = torch.arange(width, device=page_table.device)[None, :] * page_size < seq_lens[:, None]
    fits = (
        ((q_lens >= 0) & (q_lens <= seq_lens) & (seq_lens <= width * page_size)).all()
        & (q_lens.sum() == rows)
        & (~used | ((page_table >= 0) & (page_table < pages))).all()
    )
    torch.ops.aten._assert_async.msg(fits, "zerokl::attention_paged: a length or page is out of range")
