"""SwiGLU, forward and backward (R4, R7, R9). Cross-device: the bits of ``kernels/cpu/activation.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import refuse
from ._math import LOG2E, exp2, launch_options, to_bf16, to_f32
from .activation_config import activation_config


@triton.jit
def silu_and_mul_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = (g / (1 + exp(-g))) u of x = g | u; program (row, column block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    g = to_f32(tl.load(x_ptr + row * 2 * n + column, mask=mask, other=0.0))
    u = to_f32(tl.load(x_ptr + row * 2 * n + n + column, mask=mask, other=0.0))
    y = tl.div_rn(g, 1.0 + exp2(g * -LOG2E)) * u
    tl.store(y_ptr + row * n + column, to_bf16(y), mask=mask)


@triton.jit
def silu_and_mul_backward_kernel(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    """dg = (dy u) (s fma(g, 1 - s, 1)), du = dy (g / d), d = 1 + exp(-g), s = 1 / d."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    at = row * 2 * n + column
    g = to_f32(tl.load(x_ptr + at, mask=mask, other=0.0))
    u = to_f32(tl.load(x_ptr + at + n, mask=mask, other=0.0))
    dy = to_f32(tl.load(dy_ptr + row * n + column, mask=mask, other=0.0))
    one = tl.full(g.shape, 1.0, tl.float32)
    d = one + exp2(g * -LOG2E)
    s = tl.div_rn(one, d)
    tl.store(dx_ptr + at, to_bf16((dy * u) * (s * tl.fma(g, one - s, one))), mask=mask)
    tl.store(dx_ptr + at + n, to_bf16(dy * tl.div_rn(g, d)), mask=mask)


def silu_and_mul(x: torch.Tensor, row_weight: torch.Tensor | None, y: torch.Tensor) -> None:
    """``zerokl::silu_and_mul``: x bf16 [..., 2 F], y bf16 [..., F]."""
    refuse(row_weight is not None, "silu_and_mul", "row_weight")
    n = x.shape[-1] // 2
    rows = x.numel() // (2 * n)
    if rows:
        config = activation_config(n)
        silu_and_mul_kernel[rows, triton.cdiv(n, config.block)](
            x, y, n, BLOCK=config.block, **launch_options(config.num_warps)
        )


def silu_and_mul_backward(
    x: torch.Tensor,
    row_weight: torch.Tensor | None,
    dy: torch.Tensor,
    dx: torch.Tensor,
    drow_weight: torch.Tensor | None,
) -> None:
    """``zerokl::silu_and_mul_backward``: x, dx bf16 [..., 2 F], dy bf16 [..., F]."""
    refuse(row_weight is not None or drow_weight is not None, "silu_and_mul", "row_weight")
    n = x.shape[-1] // 2
    rows = x.numel() // (2 * n)
    if rows:
        config = activation_config(n)
        silu_and_mul_backward_kernel[rows, triton.cdiv(n, config.block)](
            x, dy, dx, n, BLOCK=config.block, **launch_options(config.num_warps)
        )
