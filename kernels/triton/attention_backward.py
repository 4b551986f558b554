"""Attention backward (R9), profile ``sm90-bf16``. No atomics: queries walk keys, keys walk queries, both ascending.

p = exp2(q.k c - lse), ds = (p (dO.v - D)) scale; p and ds are rounded once to bf16 before their products. D = dO . O is
an fma chain over ascending dimension, as on the CPU; so is a sink's gradient over ascending tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._attention import (
    BLOCK,
    add_weighted,
    find_tile,
    head_dims,
    load_rows,
    only_finite,
    rows_of_tile,
    score_factor,
    store_rows,
    visible,
)
from ._math import LOG2E, exp2, launch_options, to_f32
from .attention_config import (
    AttentionConfig,
    KeyGradientConfig,
    delta_config,
    key_gradient_config,
    query_gradient_config,
)


@triton.jit
def delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    sink_ptr,
    lse_ptr,
    dsink_ptr,
    rows,
    heads,
    dim,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta [rows] = chain of fma(dO, O, delta) over ascending dimension; SINKS: dsink [rows] = exp2(t - lse) delta."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    delta = tl.zeros((ROWS,), tl.float32)
    for i in range(0, dim):
        dout = to_f32(tl.load(dout_ptr + row * dim + i, mask=row < rows, other=0.0))
        delta = tl.fma(dout, to_f32(tl.load(out_ptr + row * dim + i, mask=row < rows, other=0.0)), delta)
    tl.store(delta_ptr + row, delta, mask=row < rows)
    if SINKS:
        sink = tl.load(sink_ptr + row % heads)
        lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)
        tl.store(dsink_ptr + row, exp2(sink * LOG2E - lse) * delta, mask=row < rows)


@triton.jit
def sink_gradient_kernel(row_ptr, dsink_ptr, tokens, heads, HEADS: tl.constexpr):
    """dsink [heads] = +0 less row [tokens, heads], token after token."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    mask = head < heads
    total = tl.zeros((HEADS,), tl.float32)
    at = row_ptr + head.to(tl.int64)
    for _ in range(0, tokens):
        total = total - tl.load(at, mask=mask, other=0.0)
        at += heads
    tl.store(dsink_ptr + head, total, mask=mask)


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
    window,
    c,
    scale,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Program (row tile, key head): dq of ROWS rows, a chain over ascending keys."""
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    first, keys, index, real, begin, end = rows_of_tile(
        sequence, tile, start_ptr, start_ptr, kv_heads, group, window, False, CAUSAL, ROWS
    )
    q = load_rows(q_ptr, index, real, D, D_PAD)
    dout = load_rows(dout_ptr, index, real, DV, DV_PAD)
    lse = tl.load(lse_ptr + index, mask=real, other=0.0)[:, None]
    delta = tl.load(delta_ptr + index, mask=real, other=0.0)[:, None]
    dq = tl.zeros((ROWS, D_PAD), tl.float32)
    low = tl.min(begin, axis=0)
    for block in range(low // BLOCK * BLOCK, tl.max(end, axis=0), BLOCK):
        key = block + tl.arange(0, BLOCK)
        slot = (first + key) * kv_heads + tl.program_id(1)
        k = load_rows(k_ptr, slot, key < keys, D, D_PAD)
        v = load_rows(v_ptr, slot, key < keys, DV, DV_PAD)
        finite_k, bad_k = only_finite(k)
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        p = exp2(tl.dot(q, tl.trans(k)) * c - lse)
        ds = tl.where(seen, (p * (tl.dot(dout, tl.trans(v)) - delta)) * scale, 0.0)
        dq = add_weighted(ds, seen, finite_k, bad_k, dq)
    store_rows(dq_ptr, index, dq, real, D, D_PAD)


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
    window,
    c,
    scale,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Program (key block, key head): dk and dv of KEYS keys, chains over ascending (query, head), ROWS at a time."""
    sequence, tile = find_tile(start_ptr, sequences, 1, KEYS)
    if sequence >= sequences:
        return
    kv = tl.program_id(1)
    first = tl.load(start_ptr + sequence).to(tl.int64)
    keys = (tl.load(start_ptr + sequence + 1) - first).to(tl.int32)
    key = tile * KEYS + tl.arange(0, KEYS)
    slot = (first + key) * kv_heads + kv
    k = load_rows(k_ptr, slot, key < keys, D, D_PAD)
    v = load_rows(v_ptr, slot, key < keys, DV, DV_PAD)
    dk = tl.zeros((KEYS, D_PAD), tl.float32)
    dv = tl.zeros((KEYS, DV_PAD), tl.float32)
    # the rows that can see the block, from a whole tile on
    low = tile * KEYS if CAUSAL else 0
    high = tl.where(window > 0, tl.minimum(keys, tile * KEYS + KEYS - 1 + window), keys)
    for start in range(low * group // ROWS * ROWS, high * group, ROWS):
        row = start + tl.arange(0, ROWS)
        query = row // group
        real = query < keys
        begin, end = visible(query, keys, CAUSAL, window)
        end = tl.where(real, end, 0)
        index = (first + query) * (kv_heads * group) + kv * group + row % group
        q = load_rows(q_ptr, index, real, D, D_PAD)
        dout = load_rows(dout_ptr, index, real, DV, DV_PAD)
        finite_q, bad_q = only_finite(q)
        finite_dout, bad_dout = only_finite(dout)
        lse = tl.load(lse_ptr + index, mask=real, other=0.0)[None, :]
        delta = tl.load(delta_ptr + index, mask=real, other=0.0)[None, :]
        seen = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
        p = tl.where(seen, exp2(tl.dot(k, tl.trans(q)) * c - lse), 0.0)
        ds = tl.where(seen, (p * (tl.dot(v, tl.trans(dout)) - delta)) * scale, 0.0)
        dv = add_weighted(p, seen, finite_dout, bad_dout, dv)
        dk = add_weighted(ds, seen, finite_q, bad_q, dk)
    store_rows(dk_ptr, slot, dk, key < keys, D, D_PAD)
    store_rows(dv_ptr, slot, dv, key < keys, DV, DV_PAD)


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
    """``zerokl::attention_backward``: q, k, v, out, lse, sinks as in the forward; gradients like their tensors.

    dsink_rows fp32 [T, H] is scratch; it and dsinks are given where the sinks want a gradient.
    """
    rows, heads, _ = q.shape
    kv_heads, sequences = k.shape[1], cu_seqlens.shape[0] - 1
    delta = _delta(out, lse, dout, sinks, dsink_rows, dsinks)
    if rows == 0:
        return
    group, dims = heads // kv_heads, head_dims(q, v)
    inputs = (q, k, v, cu_seqlens, lse, delta, dout)
    sizes = (sequences, kv_heads, group, window, score_factor(scale), scale)

    def options(config: AttentionConfig | KeyGradientConfig) -> dict[str, int | bool]:
        return {"CAUSAL": causal, "ROWS": config.rows, **dims, **launch_options(config.num_warps, config.num_stages)}

    tile = query_gradient_config(dims["D_PAD"], dims["DV_PAD"])
    grid = (triton.cdiv(rows * group, tile.rows) + sequences, kv_heads)
    query_gradient_kernel[grid](*inputs, dq, *sizes, **options(tile))
    block = key_gradient_config(dims["D_PAD"], dims["DV_PAD"])
    grid = (triton.cdiv(rows, block.keys) + sequences, kv_heads)
    key_gradient_kernel[grid](*inputs, dk, dv, *sizes, KEYS=block.keys, **options(block))


def _delta(
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    sinks: torch.Tensor | None,
    dsink_rows: torch.Tensor | None,
    dsinks: torch.Tensor | None,
) -> torch.Tensor:
    """D = dO . O, fp32 [T, H]; fills the gradients of the sinks where they are wanted."""
    tokens, heads, dim = out.shape
    delta = torch.empty_like(lse)
    config = delta_config()
    options = launch_options(config.num_warps, config.num_stages)
    wanted = sinks is not None and dsink_rows is not None and dsinks is not None
    pointers = (sinks, lse, dsink_rows) if wanted else (delta, delta, delta)
    if tokens:
        delta_kernel[(triton.cdiv(tokens * heads, config.rows),)](
            dout, out, delta, *pointers, tokens * heads, heads, dim, SINKS=wanted, ROWS=config.rows, **options
        )
    if wanted:
        grid = (triton.cdiv(heads, config.rows),)
        sink_gradient_kernel[grid](dsink_rows, dsinks, tokens, heads, HEADS=config.rows, **options)
    return delta
