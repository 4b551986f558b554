"""Linear layers and the embedding (R1, R2, R9)."""

from __future__ import annotations

from typing import Any

import torch

from ._common import WeightGrad, check, check_bf16, check_device, check_segments, fail, needs_grad, ops


def _linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, segments: int, out_dtype: torch.dtype
) -> torch.Tensor:
    y = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)
    ops.linear(x, w, None if bias is None else bias.float(), segments, y)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, segments: int, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.weight, ctx.bias = w, bias
        return _linear(x, w, bias, segments, out_dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dy = dy.to(torch.bfloat16).contiguous()  # the gradient of an fp32 output is rounded once
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            ops.linear_dx(dy, w, dx)
        if ctx.needs_input_grad[1]:
            grad = WeightGrad(ctx.weight)
            ops.linear_dw(dy, x, grad.buffer)
            dw = grad.result()
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            grad = WeightGrad(ctx.bias)
            ops.bias_grad(dy, grad.buffer)
            db = grad.result()
        return dx, dw, db, None, None


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    segments: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x @ w.T (+ bias)``, one fp32 chain over ascending pairs of k per output (R1), one rounding at the end.

    Args:
        x: bf16 [..., K].
        w: bf16 [N, K].
        bias: bf16 [N], added in fp32.
        segments: a power of two that divides K: that many equal chains, added as a balanced fp32 tree (R2).
        out_dtype: bf16 (default) or fp32, the chain itself.

    Returns:
        [..., N]. Backward: dx chains over ascending n, dw over ascending rows (into ``w.main_grad`` if there is one).

    Raises:
        ValueError: unsupported dtype, device, shape or segment count.
    """
    out_dtype = out_dtype or torch.bfloat16
    check_bf16("linear", x=x, w=w, bias=bias)
    # no `check`: at one row the product itself takes tens of microseconds, each call of it a quarter of one
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        fail("linear", f"x {tuple(x.shape)} does not fit w {tuple(w.shape)}")
    if bias is not None and bias.shape != (w.shape[0],):
        fail("linear", "bias must have shape [N]")
    if out_dtype is not torch.bfloat16 and out_dtype is not torch.float32:
        fail("linear", f"out_dtype {out_dtype}; supported: bfloat16, float32")
    check_segments("linear", segments, w.shape[1])
    if not w.is_contiguous():
        fail("linear", "w must be contiguous")
    forward = _Linear.apply if needs_grad(x, w, bias) else _linear
    return forward(x.contiguous(), w, bias, segments, out_dtype)


def _embedding(ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.empty((*ids.shape, w.shape[1]), dtype=w.dtype, device=w.device)
    ops.embedding(ids, w, y)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = w
        return _embedding(ids, w)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor]:
        (ids,) = ctx.saved_tensors
        grad = WeightGrad(ctx.weight)
        ops.embedding_dw(ids, dy.contiguous(), grad.buffer)
        return None, grad.result()


def embedding(ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Rows of ``w`` (bf16 [V, H]) by ``ids`` (integer [...]): bf16 [..., H], an exact copy.

    Backward adds each token's gradient to its row in fp32, in token order. Raises ValueError for unsupported dtypes and
    RuntimeError for an id outside [0, V).
    """
    check_bf16("embedding", w=w)
    check_device("embedding", w=w, ids=ids)
    check(
        not ids.dtype.is_floating_point and ids.dtype != torch.bool,
        "embedding",
        lambda: f"ids are {ids.dtype}; supported: integers",
    )
    check(w.dim() == 2 and w.is_contiguous(), "embedding", "w must be a contiguous [V, H]")
    forward = _Embedding.apply if needs_grad(w) else _embedding
    return forward(ids.to(torch.int64).contiguous(), w)
