"""Split-KV decoding (R5): every segment of 1,024 keys in a program of its own, merged in ascending order.

A segment's state starts fresh wherever it is computed and fp32 memory keeps it exactly, so the bits are those of
``attention_kernel``, which walks the same segments one after the other. After flash-decoding (Dao et al., 2023), with
cuts that the contract fixes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
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
from ._math import launch_options
from .attention_config import merge_config, segment_config

SEGMENT = tl.constexpr(contract.ATTENTION_SEGMENT)
_INF = tl.constexpr(float("inf"))


@triton.jit
def segment_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    length_ptr,
    table_ptr,
    m_ptr,
    mass_ptr,
    o_ptr,
    rows,
    sequences,
    kv_heads,
    group,
    window,
    c,
    page_size,
    max_pages,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Program (row tile, key head, segment): the state of ROWS rows, m, mass fp32 [segments, T, H], o [..., DV].

    Arguments as in ``attention_kernel``; rows = T H. A segment that no row of the tile sees is not written.
    """
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    first, keys, index, real, begin, end = rows_of_tile(
        sequence, tile, start_ptr, length_ptr, kv_heads, group, window, True, True, ROWS
    )
    segment = tl.program_id(2)
    start = tl.maximum(segment * SEGMENT, tl.min(begin, axis=0) // BLOCK * BLOCK)
    stop = tl.minimum((segment + 1) * SEGMENT, tl.max(end, axis=0))
    if start >= stop:
        return
    q = load_rows(q_ptr, index, real, D, D_PAD)
    m, mass, o = attend(
        q, k_ptr, v_ptr, table_ptr + sequence * max_pages, first, keys, kv_heads, begin, end, start, stop, c, page_size,
        True, ROWS, D, D_PAD, DV, DV_PAD,
    )  # fmt: skip
    at = segment.to(tl.int64) * rows + index
    d = tl.arange(0, DV_PAD)[None, :]
    tl.store(m_ptr + at, m, mask=real)
    tl.store(mass_ptr + at, mass, mask=real)
    tl.store(o_ptr + at[:, None] * DV + d, o, mask=real[:, None] & (d < DV))


@triton.jit
def merge_kernel(
    start_ptr,
    length_ptr,
    sink_ptr,
    m_ptr,
    mass_ptr,
    o_ptr,
    out_ptr,
    rows,
    sequences,
    kv_heads,
    group,
    window,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Program (row tile, key head): merges the segments that each row sees, ascending, then the sink; out bf16."""
    sequence, tile = find_tile(start_ptr, sequences, group, ROWS)
    if sequence >= sequences:
        return
    _, _, index, real, begin, end = rows_of_tile(
        sequence, tile, start_ptr, length_ptr, kv_heads, group, window, True, True, ROWS
    )
    m, mass, o = empty_state(ROWS, DV_PAD)
    for segment in range(tl.min(begin, axis=0) // SEGMENT, tl.cdiv(tl.max(end, axis=0), SEGMENT)):
        seen = (begin < (segment + 1) * SEGMENT) & (end > segment * SEGMENT)
        at = tl.cast(segment, tl.int64) * rows + index
        m2 = tl.load(m_ptr + at, mask=seen, other=-_INF)
        mass2 = tl.load(mass_ptr + at, mask=seen, other=0.0)
        m, mass, o = merge(m, mass, o, m2, mass2, load_rows(o_ptr, at, seen, DV, DV_PAD))
    if SINKS:
        sink = tl.load(sink_ptr + index % (kv_heads * group), mask=real, other=0.0)
        m, mass, o = add_sink(sink, m, mass, o)
    store_rows(out_ptr, index, divide(o, mass), real, DV, DV_PAD)


def attend_split(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    table: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    window: int,
    segments: int,
) -> None:
    """out of ``zerokl::attention_paged``, no sequence being longer than ``segments`` segments. start int32 [B + 1]."""
    tokens, heads, _ = q.shape
    kv_heads, sequences = k_cache.shape[2], length.shape[0]
    group, dims = heads // kv_heads, head_dims(q, v_cache)
    state = torch.empty((2, segments, tokens, heads), dtype=torch.float32, device=q.device)
    o = torch.empty((segments, tokens, heads, v_cache.shape[3]), dtype=torch.float32, device=q.device)
    sizes = (tokens * heads, sequences, kv_heads, group, window)
    config = segment_config()
    segment_kernel[triton.cdiv(tokens * group, config.rows) + sequences, kv_heads, segments](
        q,
        k_cache,
        v_cache,
        start,
        length,
        table,
        *state,
        o,
        *sizes,
        score_factor(scale),
        k_cache.shape[1],
        table.shape[1],
        ROWS=config.rows,
        **dims,
        **launch_options(config.num_warps, config.num_stages),
    )
    config = merge_config()
    merge_kernel[triton.cdiv(tokens * group, config.rows) + sequences, kv_heads](
        start,
        length,
        out if sinks is None else sinks,
        *state,
        o,
        out,
        *sizes,
        SINKS=sinks is not None,
        ROWS=config.rows,
        DV=dims["DV"],
        DV_PAD=dims["DV_PAD"],
        **launch_options(config.num_warps, config.num_stages),
    )
