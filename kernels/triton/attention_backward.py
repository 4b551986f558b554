"""Attention backward (R9), profile ``sm90-bf16``. No atomics: queries walk keys, keys walk queries, both ascending.

p = exp2(q.k c - lse), ds = (p (dO.v - D)) scale; p and ds are rounded once to bf16 before their products. D = dO . O is
an fma chain over ascending dimension, as on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import exp2, launch_options, to_bf16, to_f32
from .attention import BLOCK, add_weighted, find_tile, refuse_options, score_factor, visible
from .attention_config import AttentionConfig, delta_config, key_gradient_config, query_gradient_config


@triton.jit
def delta_kernel(dout_ptr, out_ptr, delta_ptr, rows, dim, ROWS: tl.constexpr):
    """delta [rows] = chain of fma(dO, O, delta) over ascending dimension."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    delta = tl.zeros((ROWS,), tl.float32)
    for i in range(0, dim):
        dout = to_f32(tl.load(dout_ptr + row * dim + i, mask=row < rows, other=0.0))
        delta = tl.fma(dout, to_f32(tl.load(out_ptr + row * dim + i, mask=row < rows, other=0.0)), delta)
    tl.store(delta_ptr + row, delta, mask=row < rows)


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dq_ptr,
    sequences,
    kv_heads,
    group,
    dim,
    window,
    c,
    scale,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (row tile, key head): dq of ROWS rows, a chain over ascending keys."""
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    kv = tl.program_id(1)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    keys = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // group
    real = query < keys
    begin, end = visible(query, keys, CAUSAL, window)
    begin = tl.where(real, begin, keys)
    end = tl.where(real, end, 0)
    d = tl.arange(0, DIM)
    index = (first + query) * (kv_heads * group) + kv * group + row % group
    at = index[:, None] * dim + d[None, :]
    inside = real[:, None] & (d < dim)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + index, mask=real, other=0.0)[:, None]
    delta = tl.load(delta_ptr + index, mask=real, other=0.0)[:, None]
    dq = tl.zeros((ROWS, DIM), tl.float32)
    low = tl.min(begin, axis=0)
    for block in range(low // BLOCK * BLOCK, tl.max(end, axis=0), BLOCK):
        key = block + tl.arange(0, BLOCK)
        k_at = ((first + key) * kv_heads + kv)[:, None] * dim + d[None, :]
        there = (key < keys)[:, None] & (d < dim)[None, :]
        k = tl.load(k_ptr + k_at, mask=there, other=0.0)
        v = tl.load(v_ptr + k_at, mask=there, other=0.0)
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        p = exp2(tl.dot(q, tl.trans(k)) * c - lse)
        ds = tl.where(seen, (p * (tl.dot(dout, tl.trans(v)) - delta)) * scale, 0.0)
        any_seen = (block < end) & (block + BLOCK > begin)
        dq = tl.where(any_seen[:, None], add_weighted(ds, seen, k, dq), dq)
    tl.store(dq_ptr + at, to_bf16(dq), mask=inside)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    sequences,
    kv_heads,
    group,
    dim,
    window,
    c,
    scale,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (key block, key head): dk and dv of BLOCK keys, chains over ascending (query, head), ROWS at a time."""
    sequence, tile = find_tile(start_ptr, sequences, 1, BLOCK)
    if sequence >= sequences:
        return
    kv = tl.program_id(1)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    keys = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    key = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    k_at = ((first + key) * kv_heads + kv)[:, None] * dim + d[None, :]
    there = (key < keys)[:, None] & (d < dim)[None, :]
    k = tl.load(k_ptr + k_at, mask=there, other=0.0)
    v = tl.load(v_ptr + k_at, mask=there, other=0.0)
    dk = tl.zeros((BLOCK, DIM), tl.float32)
    dv = tl.zeros((BLOCK, DIM), tl.float32)
    # the rows that can see the block, from a whole tile on
    low = tile * BLOCK if CAUSAL else 0
    high = tl.where(window > 0, tl.minimum(keys, tile * BLOCK + BLOCK - 1 + window), keys)
    for start in range(low * group // ROWS * ROWS, high * group, ROWS):
        row = start + tl.arange(0, ROWS)
        query = row // group
        real = query < keys
        begin, end = visible(query, keys, CAUSAL, window)
        index = (first + query) * (kv_heads * group) + kv * group + row % group
        at = index[:, None] * dim + d[None, :]
        inside = real[:, None] & (d < dim)[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + index, mask=real, other=0.0)[None, :]
        delta = tl.load(delta_ptr + index, mask=real, other=0.0)[None, :]
        seen = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :]) & real[None, :]
        seen = seen & (key < keys)[:, None]
        p = tl.where(seen, exp2(tl.dot(k, tl.trans(q)) * c - lse), 0.0)
        ds = tl.where(seen, (p * (tl.dot(v, tl.trans(dout)) - delta)) * scale, 0.0)
        any_seen = tl.max(seen.to(tl.int32), axis=1) > 0
        dv = tl.where(any_seen[:, None], add_weighted(p, seen, dout, dv), dv)
        dk = tl.where(any_seen[:, None], add_weighted(ds, seen, q, dk), dk)
    tl.store(dk_ptr + k_at, to_bf16(dk), mask=there)
    tl.store(dv_ptr + k_at, to_bf16(dv), mask=there)


def attention_backward(
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
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dsink_rows: torch.Tensor | None,
    dsinks: torch.Tensor | None,
) -> None:
    """``zerokl::attention_backward``: q, k, v, out, lse as in the forward; gradients like their tensors."""
    refuse_options("attention_varlen", q, v, sinks if dsink_rows is None else dsinks)
    rows, heads, dim = q.shape
    kv_heads, sequences = k.shape[1], cu_seqlens.shape[0] - 1
    if rows == 0:
        return
    group = heads // kv_heads
    delta = torch.empty_like(lse)
    config = delta_config()
    delta_kernel[(triton.cdiv(rows * heads, config.rows),)](
        dout, out, delta, rows * heads, dim, ROWS=config.rows, **launch_options(config.num_warps, config.num_stages)
    )
    inputs = (q, k, v, cu_seqlens, lse, delta, dout)
    sizes = (sequences, kv_heads, group, dim, window, score_factor(scale), scale)

    def options(config: AttentionConfig) -> dict[str, int | bool]:
        constants = {"CAUSAL": causal, "ROWS": config.rows, "DIM": max(16, triton.next_power_of_2(dim))}
        return {**constants, **launch_options(config.num_warps, config.num_stages)}

    config = query_gradient_config(dim)
    grid = (triton.cdiv(rows * group, config.rows) + sequences, kv_heads)
    query_gradient_kernel[grid](*inputs, dq, *sizes, **options(config))
    config = key_gradient_config(dim)
    grid = (triton.cdiv(rows, BLOCK.value) + sequences, kv_heads)
    key_gradient_kernel[grid](*inputs, dk, dv, *sizes, **options(config))
