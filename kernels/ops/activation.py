"""SwiGLU (R4, R7). Shazeer, "GLU Variants Improve Transformer", 2020."""

from __future__ import annotations

from typing import Any

import torch

from ._common import check, check_bf16, needs_grad, ops


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    ops.silu_and_mul(x, y)
    return y


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _silu_and_mul(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        ops.silu_and_mul_backward(x, dy.contiguous(), dx)
        return dx


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of x = gate | up: bf16 [..., 2 F] to bf16 [..., F]; fp32 inside, one rounding.

    Raises ValueError for an odd last dimension or an unsupported dtype.
    """
    check_bf16("silu_and_mul", x=x)
    check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0 and x.shape[-1] > 0,
        "silu_and_mul",
        f"x {tuple(x.shape)} must end in an even size",
    )
    x = x.contiguous()
    return _SiluAndMul.apply(x) if needs_grad(x) else _silu_and_mul(x)
