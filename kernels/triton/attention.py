"""Attention forward over packed sequences and pages (R5), profile ``sm90-bf16``: see ``_attention.py``.

One program walks a tile's keys, segment after segment. Decoding over long caches may instead give every segment a
program of its own (``attention_split.py``); the bits are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from . import attention_split
from ._attention import (
    BLOCK,
    add_sink,
    attend,
    divide,
    empty_state,
    find_tile,
    head_dims,
    load_rows,
    merge,
    rows_of_tile,
    score_factor,
    store_rows,
)
from ._math import launch_options, log2
from .attention_config import forward_config, split_config

SEGMENT = tl.constexpr(contract.ATTENTION_SEGMENT)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    length_ptr,
    table_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    sequences,
    kv_heads,
    group,
    window,
    c,
    page_size,
    max_pages,
    PAGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Program (row tile, key head): out bf16, and unless PAGED lse fp32, of ROWS rows.

    c = scale log2e. start [B + 1] int32: first query row of each sequence. PAGED: keys lie at page
    table[b, p // page_size], length [B] of them, the queries being the last; otherwise keys are packed like queries.
    SINKS: sink fp32 [H].
    """
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    first, keys, index, real, begin, end = rows_of_tile(
        sequence, tile, start_ptr, length_ptr, kv_heads, group, window, PAGED, CAUSAL, ROWS
    )
    table_ptr += sequence * max_pages
    q = load_rows(q_ptr, index, real, D, D_PAD)
    m, mass, o = empty_state(ROWS, DV_PAD)
    low = tl.min(begin, axis=0) // BLOCK * BLOCK
    high = tl.max(end, axis=0)
    for segment in range(low // SEGMENT * SEGMENT, high, SEGMENT):
        start = tl.maximum(segment, low)
        stop = tl.minimum(segment + SEGMENT, high)
        m2, mass2, o2 = attend(
            q, k_ptr, v_ptr, table_ptr, first, keys, kv_heads, begin, end, start, stop, c, page_size,
            PAGED, ROWS, D, D_PAD, DV, DV_PAD,
        )  # fmt: skip
        m, mass, o = merge(m, mass, o, m2, mass2, o2)
    if SINKS:
        sink = tl.load(sink_ptr + index % (kv_heads * group), mask=real, other=0.0)
        m, mass, o = add_sink(sink, m, mass, o)
    store_rows(out_ptr, index, divide(o, mass), real, DV, DV_PAD)
    if not PAGED:
        tl.store(lse_ptr + index, m + log2(mass), mask=real)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> None:
    """Pointers that a kernel's constants leave unread are those of another argument."""
    rows, heads, _ = q.shape
    kv_heads, sequences = k.shape[-2], start.shape[0] - 1
    group = heads // kv_heads
    dims = head_dims(q, v)
    blackwell = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 10
    config = forward_config(rows * group // sequences, dims["D_PAD"], dims["DV_PAD"], blackwell)
    grid = (triton.cdiv(rows * group, config.rows) + sequences, kv_heads)
    attention_kernel[grid](
        q,
        k,
        v,
        start,
        length,
        start if table is None else table,
        out if sinks is None else sinks,
        out,
        out if lse is None else lse,
        sequences,
        kv_heads,
        group,
        window,
        score_factor(scale),
        1 if table is None else k.shape[1],
        0 if table is None else table.shape[1],
        PAGED=table is not None,
        CAUSAL=causal,
        SINKS=sinks is not None,
        ROWS=config.rows,
        **dims,
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
    """``zerokl::attention_varlen``: q bf16 [T, H, D], k [T, Hk, D], v [T, Hk, DV], out [T, H, DV], lse fp32 [T, H],
    sinks fp32 [H]; window 0: none."""
    if q.shape[0]:
        _launch(q, k, v, cu_seqlens, cu_seqlens, None, sinks, out, lse, scale, causal, window)


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
    """``zerokl::attention_paged``: caches bf16 [pages, page_size, Hk, D or DV], contiguous; table and lengths int32."""
    pages, page_size, kv_heads, _ = k_cache.shape
    check_pages(page_table, seq_lens, q_lens, pages, page_size, q.shape[0])
    if not q.shape[0]:
        return
    start = torch.nn.functional.pad(q_lens.cumsum(0, dtype=torch.int32), (1, 0))
    # from shapes alone: lengths stay on the device
    segments = triton.cdiv(page_table.shape[1] * page_size, SEGMENT.value)
    split = split_config(q.shape[0], q.shape[1], kv_heads, v_cache.shape[3], len(seq_lens), segments)
    if split.segments > 1:
        attention_split.attend_split(
            q, k_cache, v_cache, start, seq_lens, page_table, sinks, out, scale, window, split.segments
        )
    else:
        _launch(q, k_cache, v_cache, start, seq_lens, page_table, sinks, out, None, scale, True, window)


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
