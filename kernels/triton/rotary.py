"""Rotary position embedding (R7). Cross-device: the bits of ``kernels/cpu/rotary.cpp``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_index
from ._math import launch_options, to_bf16, to_f32
from .rotary_config import rotary_config


@triton.jit
def rotary_kernel(
    x_ptr,
    position_ptr,
    table_ptr,
    y_ptr,
    heads,
    dim,
    rotary_dim,
    x_row,
    x_head,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """y_low = fma(a, c, -(b s)), y_high = fma(b, c, a s); REST > 0 copies that many dimensions past rotary_dim.

    Pairs (i, i + half); INTERLEAVED: (2 i, 2 i + 1), read and written as whole lines.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = rotary_dim // 2
    i = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < half)
    x_at = token * x_row + head.to(tl.int64) * x_head
    y_at = (token * heads + head) * dim
    table_at = table_ptr + tl.load(position_ptr + token) * rotary_dim + i
    if INTERLEAVED:
        line = tl.arange(0, 2 * HALF)[None, :]
        line_mask = (head < heads) & (line < rotary_dim)
        x = tl.load(x_ptr + x_at + line, mask=line_mask, other=0.0)
        a, b = tl.split(tl.reshape(to_f32(x), (HEADS, HALF, 2)))
    else:
        a = to_f32(tl.load(x_ptr + x_at + i, mask=mask, other=0.0))
        b = to_f32(tl.load(x_ptr + x_at + half + i, mask=mask, other=0.0))
    c = tl.broadcast_to(tl.load(table_at, mask=i < half, other=0.0), (HEADS, HALF))
    s = tl.load(table_at + half, mask=i < half, other=0.0)
    if INVERSE:
        s = -s
    if INTERLEAVED:
        y = tl.join(to_bf16(tl.fma(a, c, -(b * s))), to_bf16(tl.fma(b, c, a * s)))
        tl.store(y_ptr + y_at + line, tl.reshape(y, (HEADS, 2 * HALF)), mask=line_mask)
    else:
        tl.store(y_ptr + y_at + i, to_bf16(tl.fma(a, c, -(b * s))), mask=mask)
        tl.store(y_ptr + y_at + half + i, to_bf16(tl.fma(b, c, a * s)), mask=mask)
    if REST > 0:
        j = rotary_dim + tl.arange(0, REST)[None, :]
        mask = (head < heads) & (j < dim)
        tl.store(y_ptr + y_at + j, tl.load(x_ptr + x_at + j, mask=mask, other=0.0), mask=mask)


def rotary(
    x: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    y: torch.Tensor,
) -> None:
    """``zerokl::rotary``: x bf16 [T, heads, D], last dimension contiguous; table fp32 [positions, rotary_dim]."""
    tokens, heads, dim = x.shape
    if tokens == 0:
        return
    check_index("rotary", positions, table.shape[0])
    rest = dim - table.shape[1]
    config = rotary_config(heads)
    rotary_kernel[tokens, triton.cdiv(heads, config.heads)](
        x,
        positions,
        table,
        y,
        heads,
        dim,
        table.shape[1],
        x.stride(0),
        x.stride(1),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=config.heads,
        HALF=triton.next_power_of_2(table.shape[1] // 2),
        REST=triton.next_power_of_2(rest) if rest else 0,
        **launch_options(config.num_warps),
    )
