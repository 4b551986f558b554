"""SwiGLU, forward and backward (R4, R7, R9). Cross-device: the bits of ``kernels/cpu/activation.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import refuse
from ._math import LANES, LOG2E, exp2, fold, launch_options, to_bf16, to_f32
from .activation_config import activation_config, weighted_config


@triton.jit
def silu_and_mul_kernel(x_ptr, weight_ptr, y_ptr, n, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """y = (g / (1 + exp(-g))) u of x = g | u, times the row's weight; program (row, column block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    g = to_f32(tl.load(x_ptr + row * 2 * n + column, mask=mask, other=0.0))
    u = to_f32(tl.load(x_ptr + row * 2 * n + n + column, mask=mask, other=0.0))
    y = tl.div_rn(g, 1.0 + exp2(g * -LOG2E)) * u
    if WEIGHT:
        y = y * tl.load(weight_ptr + row)
    tl.store(y_ptr + row * n + column, to_bf16(y), mask=mask)


@triton.jit
def _gradients(g, u, dy):
    """dg = (dy u) (s fma(g, 1 - s, 1)), du = dy (g / d), and h = (g / d) u, with d = 1 + exp(-g), s = 1 / d."""
    one = tl.full(g.shape, 1.0, tl.float32)
    d = one + exp2(g * -LOG2E)
    s = tl.div_rn(one, d)
    silu = tl.div_rn(g, d)
    return (dy * u) * (s * tl.fma(g, one - s, one)), dy * silu, silu * u


@triton.jit
def silu_and_mul_backward_kernel(x_ptr, weight_ptr, dy_ptr, dx_ptr, n, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dg | du, dy times the row's weight standing for dy; program (row, column block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    at = row * 2 * n + column
    g = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
    u = to_f32(tl.load(x_ptr + at + n, mask=mask, other=0.0))
    dy = to_f32(tl.load(dy_ptr + row * n + column, mask=mask, other=0.0))
    if WEIGHT:
        dy = dy * tl.load(weight_ptr + row)
    dg, du, _ = _gradients(g, u, dy)
    tl.store(dx_ptr + at, to_bf16(dg), mask=mask)
    tl.store(dx_ptr + at + n, to_bf16(du), mask=mask)


@triton.jit
def weighted_backward_kernel(x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, rows, n, ROWS: tl.constexpr):
    """The same for ROWS whole rows, and the weights' gradient: the R3 sum of fma(dy, h, lane), h the unweighted y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    weight = tl.load(weight_ptr + row, mask=real, other=0.0)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    products = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, n, LANES):
        mask = real[:, None] & (start + lane < n)
        at = row[:, None] * 2 * n + start + lane
        g = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
        u = to_f32(tl.load(x_ptr + at + n, mask=mask, other=0.0))
        dy = to_f32(tl.load(dy_ptr + row[:, None] * n + start + lane, mask=mask, other=0.0))
        dg, du, h = _gradients(g, u, dy * weight)
        products = tl.where(mask, tl.fma(dy, h, products), products)
        tl.store(dx_ptr + at, to_bf16(dg), mask=mask)
        tl.store(dx_ptr + at + n, to_bf16(du), mask=mask)
    tl.store(dweight_ptr + row, fold(products, ROWS, LANES), mask=real)


def silu_and_mul(x: torch.Tensor, row_weight: torch.Tensor | None, y: torch.Tensor) -> None:
    """``zerokl::silu_and_mul``: x bf16 [..., 2 F], row_weight fp32 [...], y bf16 [..., F]."""
    n = x.shape[-1] // 2
    rows = x.numel() // (2 * n)
    if rows:
        config = activation_config(n)
        silu_and_mul_kernel[rows, triton.cdiv(n, config.block)](
            x,
            x if row_weight is None else row_weight,
            y,
            n,
            WEIGHT=row_weight is not None,
            BLOCK=config.block,
            **launch_options(config.num_warps),
        )


def silu_and_mul_backward(
    x: torch.Tensor,
    row_weight: torch.Tensor | None,
    dy: torch.Tensor,
    dx: torch.Tensor,
    drow_weight: torch.Tensor | None,
) -> None:
    """``zerokl::silu_and_mul_backward``: x, dx bf16 [..., 2 F], dy bf16 [..., F], weights and gradient fp32 [...]."""
    refuse(drow_weight is not None and row_weight is None, "silu_and_mul", "drow_weight without row_weight")
    n = x.shape[-1] // 2
    rows = x.numel() // (2 * n)
    if rows == 0:
        return
    if drow_weight is not None:
        weighted = weighted_config()
        weighted_backward_kernel[(triton.cdiv(rows, weighted.rows),)](
            x, row_weight, dy, dx, drow_weight, rows, n, ROWS=weighted.rows, **launch_options(weighted.num_warps)
        )
        return
    config = activation_config(n)
    silu_and_mul_backward_kernel[rows, triton.cdiv(n, config.block)](
        x,
        x if row_weight is None else row_weight,
        dy,
        dx,
        n,
        WEIGHT=row_weight is not None,
        BLOCK=config.block,
        **launch_options(config.num_warps),
    )
