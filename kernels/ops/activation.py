"""SwiGLU (R4, R7). Shazeer, "GLU Variants Improve Transformer", 2020."""

from __future__ import annotations

from typing import Any

import torch

from ._common import check, check_bf16, needs_grad, ops


def _silu_and_mul(x: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    ops.silu_and_mul(x, row_weight, y)
    return y


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, row_weight)
        return _silu_and_mul(x, row_weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, row_weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.empty_like(row_weight) if ctx.needs_input_grad[1] else None
        ops.silu_and_mul_backward(x, row_weight, dy.contiguous(), dx, dweight)
        return dx, dweight


def silu_and_mul(x: torch.Tensor, *, row_weight: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up`` of x = gate | up: bf16 [..., 2 F] to bf16 [..., F]; fp32 inside, one rounding.

    ``row_weight`` (fp32 [...], one number a row) multiplies before the rounding. Its gradient is an R3 sum.
    Raises ValueError for an odd last dimension or an unsupported dtype or shape.
    """
    check_bf16("silu_and_mul", x=x)
    check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0 and x.shape[-1] > 0,
        "silu_and_mul",
        lambda: f"x {tuple(x.shape)} must end in an even size",
    )
    check(
        row_weight is None or (row_weight.dtype == torch.float32 and row_weight.shape == x.shape[:-1]),
        "silu_and_mul",
        lambda: f"row_weight must be fp32 {tuple(x.shape[:-1])}",
    )
    x, row_weight = x.contiguous(), None if row_weight is None else row_weight.contiguous()
    forward = _SiluAndMul.apply if needs_grad(x, row_weight) else _silu_and_mul
    return forward(x, row_weight)
