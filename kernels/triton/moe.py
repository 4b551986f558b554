"""Rows to their experts and back (R8, R9), without atomics. Cross-device: the bits of ``kernels/cpu/moe.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_index
from ._math import LANES, fold, launch_options, to_bf16, to_f32
from .moe_config import combine_backward_config, combine_config


@triton.jit
def gather_kernel(x_ptr, source_ptr, y_ptr, n, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (permuted row, column block): y[row] = x[source / SLOTS], copied."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(source_ptr + row) // SLOTS
    x = tl.load(x_ptr + token * n + column, mask=column < n, other=0.0)
    tl.store(y_ptr + row * n + column, x, mask=column < n)


@triton.jit
def combine_kernel(
    y_ptr,
    position_ptr,
    weight_ptr,
    shared_ptr,
    out_ptr,
    n,
    WEIGHT: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, column block): fma(weight, y[position], .) over ascending slots from +0, ``shared`` last.

    Without weights plain additions. Slots are unrolled, so that the loads of all of them are in flight at once.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(position_ptr + token * SLOTS + slot)
        y = to_f32(tl.load(y_ptr + row * n + column, mask=mask, other=0.0))
        if WEIGHT:
            weight = tl.load(weight_ptr + token * SLOTS + slot)
            total = tl.fma(tl.broadcast_to(weight, (BLOCK,)), y, total)
        else:
            total = total + y
    if SHARED:
        total = total + to_f32(tl.load(shared_ptr + token * n + column, mask=mask, other=0.0))
    tl.store(out_ptr + token * n + column, to_bf16(total), mask=mask)


@triton.jit
def combine_backward_kernel(
    y_ptr, position_ptr, weight_ptr, dout_ptr, dy_ptr, dweight_ptr, rows, n, slots, ROWS: tl.constexpr
):
    """ROWS of the (token, slot) pairs: dy[position] = weight dout, dweight the R3 sum of fma(dout, y, lane)."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = pair < rows
    at = tl.load(position_ptr + pair, mask=real, other=0)[:, None] * n
    dout_at = (pair // slots)[:, None] * n
    weight = tl.load(weight_ptr + pair, mask=real, other=0.0)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    products = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, n, LANES):
        mask = real[:, None] & (start + lane < n)
        dout = to_f32(tl.load(dout_ptr + dout_at + start + lane, mask=mask, other=0.0))
        y = to_f32(tl.load(y_ptr + at + start + lane, mask=mask, other=0.0))
        products = tl.where(mask, tl.fma(dout, y, products), products)
        tl.store(dy_ptr + at + start + lane, to_bf16(weight * dout), mask=mask)
    tl.store(dweight_ptr + pair, fold(products, ROWS, LANES), mask=real)


def moe_order(index: torch.Tensor, offsets: torch.Tensor, source: torch.Tensor, position: torch.Tensor) -> None:
    """``zerokl::moe_order``: index int64 [T, k] to offsets [E + 1], source [T k] and position [T, k], all int64."""
    experts, rows = offsets.numel() - 1, index.numel()
    check_index("moe_permute", index, experts)
    # stable: an expert's rows stay in the order (token, slot)
    expert = torch.empty_like(source)
    torch.sort(index.view(-1), stable=True, out=(expert, source))
    position.view(-1).scatter_(0, source, torch.arange(rows, device=index.device))
    torch.searchsorted(expert, torch.arange(experts + 1, device=index.device), out=offsets)


def moe_gather(x: torch.Tensor, source: torch.Tensor, slots: int, y: torch.Tensor) -> None:
    """``zerokl::moe_gather``: x bf16 [T, H], source int64 [T k], y bf16 [T k, H]."""
    rows, n = y.shape
    if y.numel():
        config = combine_config(n)
        gather_kernel[rows, triton.cdiv(n, config.block)](
            x, source, y, n, SLOTS=slots, BLOCK=config.block, **launch_options(config.num_warps)
        )


def moe_combine(
    y: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor | None,
    shared: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """``zerokl::moe_combine``: y bf16 [T k, H], position int64 and weight fp32 [T, k], shared and out bf16 [T, H]."""
    tokens, n = out.shape
    if out.numel():
        config = combine_config(n)
        combine_kernel[tokens, triton.cdiv(n, config.block)](
            y,
            position,
            position if weight is None else weight,
            out if shared is None else shared,
            out,
            n,
            WEIGHT=weight is not None,
            SHARED=shared is not None,
            SLOTS=position.shape[1],
            BLOCK=config.block,
            **launch_options(config.num_warps),
        )


def moe_combine_backward(
    y: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    dout: torch.Tensor,
    dy: torch.Tensor,
    dweight: torch.Tensor,
) -> None:
    """``zerokl::moe_combine_backward``: y, dy bf16 [T k, H], dout bf16 [T, H], weight, dweight fp32 [T, k]."""
    rows, n = y.shape
    if rows:
        config = combine_backward_config()
        combine_backward_kernel[(triton.cdiv(rows, config.rows),)](
            y,
            position,
            weight,
            dout,
            dy,
            dweight,
            rows,
            n,
            position.shape[1],
            ROWS=config.rows,
            **launch_options(config.num_warps),
        )
