"""RMSNorm (R3, R7, R9). Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

from __future__ import annotations

from typing import Any, overload

import torch

from ._common import WeightGrad, check, check_bf16, needs_grad, ops


def _rms_norm(
    x: torch.Tensor, w: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    ops.rms_norm(x, residual, w, eps, y, total)
    return y, total


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float, residual: torch.Tensor | None) -> Any:
        y, total = _rms_norm(x, w, eps, residual)
        ctx.save_for_backward(x if total is None else total, w)
        ctx.weight, ctx.eps, ctx.has_residual = w, eps, residual is not None
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = torch.empty_like(x)
        grad = WeightGrad(ctx.weight) if ctx.needs_input_grad[1] else None
        ops.rms_norm_backward(
            x,
            w,
            ctx.eps,
            dy.contiguous(),
            None if dtotal is None else dtotal.contiguous(),
            dx,
            None if grad is None else grad.buffer,
        )
        return dx, None if grad is None else grad.result(), None, dx if ctx.has_residual else None


@overload
def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float, *, residual: None = None) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, w: torch.Tensor, eps: float, *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor, w: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``(x / sqrt(mean(x^2) + eps)) w`` over the last dimension; per-head when that is the head dimension.

    Args:
        x: bf16 [..., N].
        w: bf16 [N].
        eps: added to the mean, fp32.
        residual: bf16 like x. Then ``s = RNE(x + residual)`` is formed first and the norm reads the rounded ``s`` (R7).

    Returns:
        bf16 y like x; with a residual the pair (y, s). Statistics follow R3; y is rounded once.

    Raises:
        ValueError: unsupported dtype, device or shape.
    """
    check_bf16("rms_norm", x=x, w=w, residual=residual)
    check(
        w.dim() == 1 and x.dim() >= 1 and x.shape[-1] == w.shape[0] > 0,
        "rms_norm",
        lambda: f"x {tuple(x.shape)} does not fit w {tuple(w.shape)}",
    )
    check(w.is_contiguous(), "rms_norm", "w must be contiguous")
    check(residual is None or residual.shape == x.shape, "rms_norm", "residual must have x's shape")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if needs_grad(x, w, residual):
        return _RmsNorm.apply(x, w, eps, residual)
    y, total = _rms_norm(x, w, eps, residual)
    return y if total is None else (y, total)
