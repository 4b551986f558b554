"""Linear layers on codes (CONTRACT.md, Quantisers), in profile ``sm90-bf16``.

What differs from the CPU is what a matrix step computes; blocks, promotion and rounding are the contract's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from ._codes import e4m3_to_f32, int4_to_f32, scale_to_f32
from ._math import launch_options, to_bf16
from .linear import finish, rows_and_columns
from .quantized_linear_config import int4_linear_config, scaled_linear_config

_INT4_K = 128  # k of a step of int4_linear: a whole number of groups


@triton.jit
def scaled_linear_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    BLOCK: tl.constexpr,
    W_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [m, n] of e4m3 codes x [m, k], w [n, k], a scale per BLOCK of k and per row of x, per W_ROWS rows of w.

    Per block ``acc = acc + (sx sw) partial``, ascending. Blocks of 128 multiply the codes as they are; blocks of 32
    widened to bf16, exactly, by the steps of R1. Rows and columns past the edge wrap around and are not stored.
    """
    row, column = rows_and_columns(m, n, BLOCK_M, BLOCK_N, GROUP)
    blocks = tl.cdiv(k, BLOCK)
    i = tl.arange(0, BLOCK)
    x_at = x_ptr + (row % m).to(tl.int64)[:, None] * k + i[None, :]
    w_at = w_ptr + (column % n).to(tl.int64)[None, :] * k + i[:, None]
    x_scale_at = x_scale_ptr + (row % m).to(tl.int64) * blocks
    w_scale_at = w_scale_ptr + ((column % n) // W_ROWS).to(tl.int64) * blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, blocks):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = k - block * BLOCK
            x = tl.load(x_at, mask=(i < left)[None, :], other=0)
            w = tl.load(w_at, mask=(i < left)[:, None], other=0)
        if W_ROWS == 1:
            partial = tl.dot(to_bf16(e4m3_to_f32(x)), to_bf16(e4m3_to_f32(w)))
        else:
            fp8_x = x.to(tl.float8e4nv, bitcast=True)
            partial = tl.dot(fp8_x, w.to(tl.float8e4nv, bitcast=True), max_num_imprecise_acc=BLOCK)
        sx = scale_to_f32(tl.load(x_scale_at + block))
        sw = scale_to_f32(tl.load(w_scale_at + block))
        acc = acc + (sx[:, None] * sw[None, :]) * partial
        x_at += BLOCK
        w_at += BLOCK
    finish(acc, bias_ptr, y_ptr, row, column, m, n, BIAS, ROUND)


@triton.jit
def int4_linear_kernel(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [m, n] of bf16 x [m, k] and int4 words w [n, k / 8] with a bf16 scale per WIDTH of k.

    R1 on ``bf16(code scale)``, dequantised in registers. Past k everything is zero.
    """
    row, column = rows_and_columns(m, n, BLOCK_M, BLOCK_N, GROUP)
    i = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    scale = tl.arange(0, BLOCK_K // WIDTH)
    x_at = x_ptr + (row % m).to(tl.int64)[:, None] * k + i[None, :]
    w_row = (column % n).to(tl.int64)[:, None]
    w_at = w_ptr + w_row * (k // 8) + word[None, :]
    scale_at = w_scale_ptr + w_row * (k // WIDTH) + scale[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            words = tl.load(w_at)
            s = tl.load(scale_at)
        else:
            x = tl.load(x_at, mask=(i < k - start)[None, :], other=0.0)
            words = tl.load(w_at, mask=(word * 8 < k - start)[None, :], other=0)
            s = tl.load(scale_at, mask=(scale * WIDTH < k - start)[None, :], other=0.0)
        code = tl.reshape(int4_to_f32(words, BLOCK_N, BLOCK_K), (BLOCK_N, BLOCK_K // WIDTH, WIDTH))
        w = to_bf16(tl.reshape(code * scale_to_f32(s)[:, :, None], (BLOCK_N, BLOCK_K)))
        acc = tl.dot(x, tl.trans(w), acc)
        x_at += BLOCK_K
        w_at += BLOCK_K // 8
        scale_at += BLOCK_K // WIDTH
    finish(acc, bias_ptr, y_ptr, row, column, m, n, BIAS, ROUND)


def check_fp8_steps(device: torch.device) -> None:
    """RuntimeError for a GPU whose e4m3 matrix steps are not those of the contract: wgmma and tcgen05, never mma.sync.

    Capability 8.0 has none, 8.9 and 12.x have ``mma.sync`` alone.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if not 9 <= major < 12:
        raise RuntimeError(
            f"zerokl.kernels.fp8_linear: {device} has compute capability {major}.{minor}, without the e4m3 matrix "
            "steps of the contract (wgmma, tcgen05); supported: 9.0 to 11.x. mxfp8_linear, int4_linear and linear need "
            "bf16 steps only"
        )


def scaled_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    block: int,
    w_rows: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """``zerokl::scaled_linear``: e4m3 codes x [..., K], w [N, K] as bytes, scales fp32 or E8M0 bytes, bias fp32 [N]."""
    (n, k), m = w.shape, x.numel() // w.shape[1]
    if (block, w_rows) not in ((contract.FP8_BLOCK, contract.FP8_BLOCK), (contract.MX_BLOCK, 1)):
        raise ValueError(f"zerokl::scaled_linear: block={block}, w_rows={w_rows}; supported on CUDA: 128, 128 or 32, 1")
    if w_rows > 1 and x.is_cuda:
        check_fp8_steps(x.device)
    if m == 0 or n == 0:
        return
    config = scaled_linear_config(m)
    scaled_linear_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
        x,
        x_scales,
        w,
        w_scales,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        BLOCK=block,
        W_ROWS=w_rows,
        BIAS=bias is not None,
        ROUND=y.dtype == torch.bfloat16,
        EVEN_K=k % block == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP=config.group,
        **launch_options(config.num_warps, config.num_stages),
    )


def int4_linear(
    x: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """``zerokl::int4_linear``: x bf16 [..., K], w int32 [N, K / 8], w_scales bf16 [N, K / group], bias fp32 [N]."""
    n, k = w.shape[0], w.shape[1] * 8
    m = x.numel() // k
    if m == 0 or n == 0:
        return
    config = int4_linear_config(m)
    int4_linear_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
        x,
        w,
        w_scales,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        WIDTH=k // w_scales.shape[1],
        BIAS=bias is not None,
        ROUND=y.dtype == torch.bfloat16,
        EVEN_K=k % _INT4_K == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=_INT4_K,
        GROUP=config.group,
        **launch_options(config.num_warps, config.num_stages),
    )
