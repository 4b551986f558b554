"""Linear layers of experts, forward and backward (R1, R2, R8, R9), by profile ``sm90-bf16`` like ``linear``.

The host never reads the offsets: the grid is bounded by rows and experts, and a program finds its expert on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_offsets
from ._math import launch_options, to_bf16
from .linear import MAX_SEGMENTS, chain, place, tree
from .linear_config import linear_config


@triton.jit
def _owner(offsets_ptr, experts, tile, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, which of its row tiles) of a tile, experts in order; one past the last expert for a tile too many."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    tiles = ((end - begin + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    passed = tl.cumsum(tiles, axis=0) <= tile
    before = tl.sum(tl.where(passed, tiles, 0), axis=0)
    return tl.minimum(tl.sum(passed.to(tl.int32), axis=0), experts), tile - before


@triton.jit
def grouped_kernel(
    a_ptr,
    w_ptr,
    offsets_ptr,
    y_ptr,
    experts,
    n,
    depth,
    tiles_m,
    a_row,
    w_expert,
    w_row,
    w_column,
    SEGMENTS: tl.constexpr,
    ROUND: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [R, n] = a [R, k] w[e] [k, n] for the rows of each expert e, bf16 (y fp32 without ROUND);
    depth = k / SEGMENTS.

    A program's rows belong to one expert. Rows and columns past the edge repeat the last ones and are not stored.
    """
    tile, tile_n = place(tiles_m, tl.cdiv(n, BLOCK_N), GROUP)
    expert, tile_m = _owner(offsets_ptr, experts, tile, BLOCK_M, EXPERTS)
    if expert < experts:
        end = tl.load(offsets_ptr + expert + 1)
        row = tl.load(offsets_ptr + expert) + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        i = tl.arange(0, BLOCK_K).to(tl.int64)
        a_at = a_ptr + tl.minimum(row, end - 1)[:, None] * a_row + i[None, :]
        w_at = w_ptr + expert.to(tl.int64) * w_expert
        w_at += i[:, None] * w_row + (column % n).to(tl.int64)[None, :] * w_column
        shape: tl.constexpr = (BLOCK_M, BLOCK_N)
        if SEGMENTS > 1:
            acc = tree(a_at, w_at, depth, 1, w_row, shape, SEGMENTS, BLOCK_K, EVEN_K)
        else:
            acc = chain(a_at, w_at, tl.zeros(shape, tl.float32), depth, 1, w_row, BLOCK_K, EVEN_K)
        mask = (row < end)[:, None] & (column < n)[None, :]
        tl.store(y_ptr + row[:, None] * n + column[None, :], to_bf16(acc) if ROUND else acc, mask=mask)


@triton.jit
def grouped_dw_kernel(
    dy_ptr,
    x_ptr,
    offsets_ptr,
    dw_ptr,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (tile, expert): dw[e] [n, k] continues its chain dy.T x over the expert's ascending rows."""
    expert = tl.program_id(1).to(tl.int64)
    begin = tl.load(offsets_ptr + expert)
    rows = (tl.load(offsets_ptr + expert + 1) - begin).to(tl.int32)
    if rows > 0:
        tiles_k = tl.cdiv(k, BLOCK_K)
        row = (tl.program_id(0) // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        token = begin + tl.arange(0, BLOCK_R)
        dy_at = dy_ptr + (row % n).to(tl.int64)[:, None] + token[None, :] * n
        x_at = x_ptr + token[:, None] * k + (column % k).to(tl.int64)[None, :]
        at = dw_ptr + expert * n * k + row.to(tl.int64)[:, None] * k + column[None, :]
        mask = (row < n)[:, None] & (column < k)[None, :]
        acc = chain(dy_at, x_at, tl.load(at, mask=mask, other=0.0), rows, n, k, BLOCK_R, False)
        tl.store(at, acc, mask=mask)


def _grouped(
    a: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    y: torch.Tensor,
    strides: tuple[int, int],
    segments: int = 1,
) -> None:
    """y [R, n] = a [R, k] w[e]; strides: of w[e] along k and n. Tiles suit an expert with its even share of rows."""
    (rows, k), n, experts = a.shape, y.shape[1], w.shape[0]
    check_offsets("grouped_linear", offsets, rows)
    if segments > MAX_SEGMENTS:
        raise ValueError(f"zerokl::grouped_linear: segments={segments}; supported on CUDA: 1 to {MAX_SEGMENTS}")
    if rows == 0 or n == 0:
        return
    config = linear_config(triton.cdiv(rows, experts), n, segments)
    # every expert that owns a row may end in a short tile
    tiles_m = (rows + min(rows, experts) * (config.block_m - 1)) // config.block_m
    grouped_kernel[(tiles_m * triton.cdiv(n, config.block_n),)](
        a,
        w,
        offsets,
        y,
        experts,
        n,
        k // segments,
        tiles_m,
        k,
        n * k,
        *strides,
        SEGMENTS=segments,
        ROUND=y.dtype == torch.bfloat16,
        EVEN_K=(k // segments) % config.block_k == 0,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        **launch_options(config.num_warps, config.num_stages),
    )


def grouped_linear(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, segments: int, y: torch.Tensor) -> None:
    """``zerokl::grouped_linear``: x bf16 [R, K], w bf16 [E, N, K], offsets int64 [E + 1], y bf16 or fp32 [R, N]."""
    _grouped(x, w, offsets, y, (1, w.shape[2]), segments)


def grouped_linear_dx(dy: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, dx: torch.Tensor) -> None:
    """``zerokl::grouped_linear_dx``: dx bf16 [R, K] chains over ascending n."""
    _grouped(dy, w, offsets, dx, (w.shape[2], 1))


def grouped_linear_dw(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dw: torch.Tensor) -> None:
    """``zerokl::grouped_linear_dw``: dw fp32 [E, N, K] continues its chains over ascending rows of each expert."""
    experts, n, k = dw.shape
    check_offsets("grouped_linear", offsets, dy.shape[0])
    if dy.shape[0] == 0 or n == 0 or k == 0:
        return
    config = linear_config(n, k, 1)
    grouped_dw_kernel[triton.cdiv(n, config.block_m) * triton.cdiv(k, config.block_n), experts](
        dy,
        x,
        offsets,
        dw,
        n,
        k,
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_R=config.block_k,
        **launch_options(config.num_warps, config.num_stages),
    )
