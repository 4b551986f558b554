"""RMSNorm, forward and backward (R3, R7, R9). Cross-device: the bits of ``kernels/cpu/norm.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import LANES, fold, launch_options, to_bf16, to_f32
from .norm_config import norm_config


@triton.jit
def _load_sum(x_ptr, residual_ptr, at, mask, RESIDUAL: tl.constexpr):
    """x, or the rounded sum of x and the residual, as fp32."""
    x = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
    if RESIDUAL:
        x = to_f32(to_bf16(x + to_f32(tl.load(residual_ptr + at, mask=mask, other=0.0))))
    return x


@triton.jit
def _inverse_rms(square_sum, n, eps):
    one = tl.full(square_sum.shape, 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(tl.div_rn(square_sum, one * n) + eps))


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, sum_ptr, rows, n, eps, RESIDUAL: tl.constexpr, ROWS: tl.constexpr
):
    """y = (s r) w of ROWS rows of n; s = x, or RNE(x + residual), which is stored too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    squares = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, n, LANES):
        mask = (row < rows) & (start + lane < n)
        s = _load_sum(x_ptr, residual_ptr, row * n + start + lane, mask, RESIDUAL)
        squares = tl.where(mask, tl.fma(s, s, squares), squares)
    r = _inverse_rms(fold(squares, ROWS, LANES), n, eps)[:, None]
    for start in range(0, n, LANES):
        at = row * n + start + lane
        mask = (row < rows) & (start + lane < n)
        # summed again: another thread may have written the stored sum
        s = _load_sum(x_ptr, residual_ptr, at, mask, RESIDUAL)
        w = to_f32(tl.load(w_ptr + start + lane, mask=start + lane < n, other=0.0))
        if RESIDUAL:
            tl.store(sum_ptr + at, to_bf16(s), mask=mask)
        tl.store(y_ptr + at, to_bf16((s * r) * w), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    x_ptr, w_ptr, dy_ptr, dsum_ptr, dx_ptr, inverse_ptr, rows, n, eps, DSUM: tl.constexpr, ROWS: tl.constexpr
):
    """dx = fma(x, -(((S r) r) r / n), g r) (+ dsum), g = dy w, S = sum of g x; stores r for the weight gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    squares = tl.zeros((ROWS, LANES), tl.float32)
    products = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, n, LANES):
        at = row * n + start + lane
        mask = (row < rows) & (start + lane < n)
        x = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
        w = to_f32(tl.load(w_ptr + start + lane, mask=start + lane < n, other=0.0))
        g = to_f32(tl.load(dy_ptr + at, mask=mask, other=0.0)) * w
        squares = tl.where(mask, tl.fma(x, x, squares), squares)
        products = tl.where(mask, tl.fma(g, x, products), products)
    r = _inverse_rms(fold(squares, ROWS, LANES), n, eps)
    scaled = ((fold(products, ROWS, LANES) * r) * r) * r
    c = -tl.div_rn(scaled, tl.full(scaled.shape, 1.0, tl.float32) * n)[:, None]
    row_at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(inverse_ptr + row_at, r, mask=row_at < rows)
    for start in range(0, n, LANES):
        at = row * n + start + lane
        mask = (row < rows) & (start + lane < n)
        x = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
        w = to_f32(tl.load(w_ptr + start + lane, mask=start + lane < n, other=0.0))
        g = to_f32(tl.load(dy_ptr + at, mask=mask, other=0.0)) * w
        d = tl.fma(x, tl.broadcast_to(c, (ROWS, LANES)), g * r[:, None])
        if DSUM:
            d = d + to_f32(tl.load(dsum_ptr + at, mask=mask, other=0.0))
        tl.store(dx_ptr + at, to_bf16(d), mask=mask)


@triton.jit
def rms_norm_dw_kernel(x_ptr, dy_ptr, inverse_ptr, dw_ptr, rows, n, COLUMNS: tl.constexpr):
    """dw continues the chain fma(dy, x r, dw) over ascending rows; a program owns COLUMNS columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < n
    dw = tl.load(dw_ptr + column, mask=mask, other=0.0)
    at = column.to(tl.int64)
    for row in range(0, rows):
        x = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
        dy = to_f32(tl.load(dy_ptr + at, mask=mask, other=0.0))
        dw = tl.fma(dy, x * tl.load(inverse_ptr + row), dw)
        at += n
    tl.store(dw_ptr + column, dw, mask=mask)


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """``zerokl::rms_norm``: x, residual, y, total bf16 [..., N], w bf16 [N]."""
    n = w.numel()
    rows = x.numel() // n
    if rows == 0:
        return
    config = norm_config(rows, n)
    rms_norm_kernel[(triton.cdiv(rows, config.rows),)](
        x,
        x if residual is None else residual,
        w,
        y,
        y if total is None else total,
        rows,
        n,
        eps,
        RESIDUAL=residual is not None,
        ROWS=config.rows,
        **launch_options(config.num_warps, config.num_stages),
    )


def rms_norm_backward(
    x: torch.Tensor,
    w: torch.Tensor,
    eps: float,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    dx: torch.Tensor,
    dw: torch.Tensor | None,
) -> None:
    """``zerokl::rms_norm_backward``: x, dy, dsum, dx bf16 [..., N]; dw fp32 [N] is continued."""
    n = w.numel()
    rows = x.numel() // n
    if rows == 0:
        return
    config = norm_config(rows, n)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    options = launch_options(config.num_warps, config.num_stages)
    rms_norm_backward_kernel[(triton.cdiv(rows, config.rows),)](
        x,
        w,
        dy,
        dx if dsum is None else dsum,
        dx,
        inverse,
        rows,
        n,
        eps,
        DSUM=dsum is not None,
        ROWS=config.rows,
        **options,
    )
    if dw is not None:
        options["num_warps"] = 1
        rms_norm_dw_kernel[(triton.cdiv(n, config.columns),)](
            x, dy, inverse, dw, rows, n, COLUMNS=config.columns, **options
        )
