"""Linear layers on quantised operands (CONTRACT.md, Quantisers; R1, R9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from .. import contract
from ._common import WeightGrad, check, check_bf16, check_device, needs_grad, ops
from .quantize import (
    Fp8Block,
    Int4Group,
    Mxfp8,
    check_int4,
    dequantize_fp8_block,
    dequantize_int4_group,
    dequantize_mxfp8,
    quantize_fp8_block,
    quantize_mxfp8,
)

Operand = Callable[[], torch.Tensor]


class _QuantizedLinear(torch.autograd.Function):
    """``forward()``, and as its gradients those of a bf16 linear on the operands the codes stand for (R9).

    Both pass straight through the quantisers: dX to the first argument, dW to ``master``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        _: torch.Tensor | None,
        master: torch.Tensor | None,
        bias: torch.Tensor | None,
        forward: Operand,
        x_value: Operand,
        w_value: Operand,
    ) -> torch.Tensor:
        ctx.master, ctx.bias, ctx.x_value, ctx.w_value = master, bias, x_value, w_value
        return forward()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = dy.to(torch.bfloat16).contiguous()  # the gradient of an fp32 output is rounded once
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            w = ctx.w_value()
            dx = torch.empty((*dy.shape[:-1], w.shape[1]), dtype=torch.bfloat16, device=dy.device)
            ops.linear_dx(dy, w, dx)
        if ctx.needs_input_grad[1]:
            grad = WeightGrad(ctx.master)
            ops.linear_dw(dy, ctx.x_value(), grad.buffer)
            dw = grad.result()
        if ctx.needs_input_grad[2]:
            grad = WeightGrad(ctx.bias)
            ops.bias_grad(dy, grad.buffer)
            db = grad.result()
        return dx, dw, db, None, None, None


def _run(
    op: str,
    x: torch.Tensor | None,
    w_codes: torch.Tensor,
    w_shape: tuple[int, ...],
    master: torch.Tensor | None,
    bias: torch.Tensor | None,
    forward: Operand,
    x_value: Operand,
    w_value: Operand,
) -> torch.Tensor:
    check_bf16(op, master=master, bias=bias)
    check_device(op, w=w_codes, master=master, bias=bias)
    check(
        master is None or (master.shape == w_shape and master.is_contiguous()),
        op,
        f"master must be a contiguous tensor of w's shape {w_shape}",
    )
    check(bias is None or bias.shape == w_shape[:1], op, "bias must have shape [N]")
    if needs_grad(x, master, bias):
        return cast(torch.Tensor, _QuantizedLinear.apply(x, master, bias, forward, x_value, w_value))
    return forward()


def _output(
    op: str, x: torch.Tensor, n: int, bias: torch.Tensor | None, out_dtype: torch.dtype | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(fp32 bias, y to be written)."""
    out_dtype = out_dtype or torch.bfloat16
    check(out_dtype in (torch.bfloat16, torch.float32), op, f"out_dtype {out_dtype}; supported: bfloat16, float32")
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype, device=x.device)
    return None if bias is None else bias.detach().float(), y


def _scaled_linear(
    x: Fp8Block | Mxfp8,
    w: Fp8Block | Mxfp8,
    bias: torch.Tensor | None,
    block: int,
    w_rows: int,
    out_dtype: torch.dtype | None,
    op: str,
) -> torch.Tensor:
    bias, y = _output(op, x.codes, w.codes.shape[0], bias, out_dtype)
    bytes_of = [q.scales.contiguous() for q in (x, w)]
    x_scales, w_scales = (s.view(torch.uint8) if s.dtype == torch.float8_e8m0fnu else s for s in bytes_of)
    x_codes, w_codes = (q.codes.contiguous().view(torch.uint8) for q in (x, w))
    ops.scaled_linear(x_codes, x_scales, w_codes, w_scales, block, w_rows, bias, y)
    return y


def _int4_linear(
    x: torch.Tensor, w: Int4Group, bias: torch.Tensor | None, out_dtype: torch.dtype | None, op: str
) -> torch.Tensor:
    bias, y = _output(op, x, w.codes.shape[0], bias, out_dtype)
    ops.int4_linear(x, w.codes.contiguous(), w.scales.contiguous(), bias, y)
    return y


def _check_operands(op: str, x: Fp8Block | Mxfp8, w: Fp8Block | Mxfp8, block: int, w_rows: int) -> None:
    fp8, scale = torch.float8_e4m3fn, torch.float8_e8m0fnu if isinstance(w, Mxfp8) else torch.float32
    check_device(op, x_codes=x.codes, x_scales=x.scales, w_codes=w.codes, w_scales=w.scales)
    for name, q in (("x", x), ("w", w)):
        check(q.codes.dtype == fp8 and q.codes.dim() >= 1, op, f"{name}.codes are {q.codes.dtype}; supported: {fp8}")
        check(q.scales.dtype == scale, op, f"{name}.scales are {q.scales.dtype}; supported: {scale}")
    check(
        w.codes.dim() == 2 and x.codes.shape[-1] == w.codes.shape[1],
        op,
        f"x.codes {tuple(x.codes.shape)} do not fit w.codes {tuple(w.codes.shape)}; supported: [..., K], [N, K]",
    )
    n, k = w.codes.shape
    blocks = -(-k // block)
    check(
        x.scales.shape == (*x.codes.shape[:-1], blocks) and w.scales.shape == (-(-n // w_rows), blocks),
        op,
        f"x.scales {tuple(x.scales.shape)} or w.scales {tuple(w.scales.shape)} do not fit the codes",
    )


def fp8_linear(
    x: torch.Tensor | Fp8Block,
    w: Fp8Block,
    bias: torch.Tensor | None = None,
    *,
    power_of_two: bool = False,
    master: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x @ w.T (+ bias)`` on e4m3 codes: per 128 of k one fp32 chain (R1), then ``acc + (sx sw) partial``.

    Args:
        x: bf16 [..., K], quantised here by (1, 128) blocks; or an :class:`Fp8Block` of those.
        w: :class:`Fp8Block` [N, K] of (128, 128) blocks.
        bias: bf16 [N], added in fp32 before the one rounding.
        power_of_two: how a bf16 x is quantised (see :func:`quantize_fp8_block`).
        master: bf16 [N, K], what w was quantised from. It takes part in no arithmetic; it gets w's gradient (into
            ``main_grad`` if there is one).
        out_dtype: bf16 (default), rounded once, or fp32.

    Returns:
        [..., N]. Backward: :func:`linear`'s on the dequantised operands, straight through the quantisers.

    Raises:
        ValueError: unsupported dtype, shape or block.
    """
    op, edge = "fp8_linear", contract.FP8_BLOCK
    given = x if isinstance(x, torch.Tensor) else None
    q = quantize_fp8_block(x, block=(1, edge), power_of_two=power_of_two) if isinstance(x, torch.Tensor) else x
    check(q.block == (1, edge), op, f"x has blocks {q.block}; supported: (1, {edge})")
    check(w.block == (edge, edge), op, f"w has blocks {w.block}; supported: ({edge}, {edge})")
    _check_operands(op, q, w, edge, edge)
    return _run(
        op,
        given,
        w.codes,
        w.codes.shape,
        master,
        bias,
        lambda: _scaled_linear(q, w, bias, edge, edge, out_dtype, op),
        lambda: dequantize_fp8_block(q),
        lambda: dequantize_fp8_block(w),
    )


def mxfp8_linear(
    x: torch.Tensor | Mxfp8,
    w: Mxfp8,
    bias: torch.Tensor | None = None,
    *,
    rounding: str = "rceil",
    master: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x @ w.T (+ bias)`` on MXFP8: as :func:`fp8_linear` by blocks of 32, over which both scales are constant.

    Args:
        x: bf16 [..., K], quantised here, K a multiple of 32; or an :class:`Mxfp8`.
        w: :class:`Mxfp8` [N, K].
        bias: bf16 [N], added in fp32 before the one rounding.
        rounding: how a bf16 x is quantised (see :func:`quantize_mxfp8`).
        master, out_dtype: as for :func:`fp8_linear`.

    Returns:
        [..., N]. Backward: :func:`linear`'s on the dequantised operands, straight through the quantisers.

    Raises:
        ValueError: unsupported dtype, shape or rounding.
    """
    op = "mxfp8_linear"
    given = x if isinstance(x, torch.Tensor) else None
    q = quantize_mxfp8(x, rounding=rounding) if isinstance(x, torch.Tensor) else x
    _check_operands(op, q, w, contract.MX_BLOCK, 1)
    return _run(
        op,
        given,
        w.codes,
        w.codes.shape,
        master,
        bias,
        lambda: _scaled_linear(q, w, bias, contract.MX_BLOCK, 1, out_dtype, op),
        lambda: dequantize_mxfp8(q),
        lambda: dequantize_mxfp8(w),
    )


def int4_linear(
    x: torch.Tensor,
    w: Int4Group,
    bias: torch.Tensor | None = None,
    *,
    master: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x @ w.T (+ bias)`` with INT4 weights: :func:`linear` (R1) on the weight dequantised to bf16.

    Args:
        x: bf16 [..., K].
        w: :class:`Int4Group` of [N, K].
        bias: bf16 [N], added in fp32 before the one rounding.
        master, out_dtype: as for :func:`fp8_linear`.

    Returns:
        [..., N]. Backward: :func:`linear`'s on x and the dequantised weight, straight through the quantiser.

    Raises:
        ValueError: unsupported dtype or shape.
    """
    op = "int4_linear"
    check_bf16(op, x=x)
    check(w.codes.dim() == 2, op, f"w.codes {tuple(w.codes.shape)}; supported: [N, K / 8]")
    n, k = check_int4(w, op)
    check_device(op, x=x, w=w.codes)
    check(x.dim() >= 1 and x.shape[-1] == k, op, f"x {tuple(x.shape)} does not fit w [{n}, {k}]")
    value = x.detach().contiguous()
    return _run(
        op,
        x,
        w.codes,
        (n, k),
        master,
        bias,
        lambda: _int4_linear(value, w, bias, out_dtype, op),
        lambda: value,
        lambda: dequantize_int4_group(w),
    )
