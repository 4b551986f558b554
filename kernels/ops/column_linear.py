"""A linear layer whose columns ranks may share, with one gradient for all numbers of ranks (R2, R9)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ._common import WeightGrad, check, check_bf16, check_segments, ops
from .collective import tree_all_reduce
from .linear import linear


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        segments: int,
        blocks: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.weight, ctx.bias = w, bias
        ctx.own, ctx.blocks, ctx.group = segments // dist.get_world_size(group), blocks, group
        return linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            columns = _by_segment(dy.movedim(-1, 0), ctx.blocks, ctx.own).movedim(0, -1).contiguous()
            rows = _by_segment(w, ctx.blocks, ctx.own).t().contiguous()
            part = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            ops.linear(columns, rows, None, ctx.own, part)
            dx = tree_all_reduce(part, ctx.group).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad = WeightGrad(ctx.weight)
            ops.linear_dw(dy.contiguous(), x, grad.buffer)
            dw = grad.result()
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            grad = WeightGrad(ctx.bias)
            ops.bias_grad(dy.contiguous(), grad.buffer)
            db = grad.result()
        return dx, dw, db, None, None, None


def _by_segment(x: torch.Tensor, blocks: int, segments: int) -> torch.Tensor:
    """Rows [blocks, segments, ...] -> [segments, blocks, ...], flat."""
    return x.unflatten(0, (blocks, segments, -1)).transpose(0, 1).flatten(0, 2)


def column_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    segments: int,
    blocks: int = 1,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """``y = x @ w.T (+ bias)`` by R1; each rank of a group computes its own columns.

    (Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019.)

    Args:
        x: bf16 [..., K], the same on every rank.
        w: bf16 [N / ranks, K], this rank's rows.
        bias: bf16 [N / ranks], of the same columns.
        segments: G of R2, a power of two that the ranks divide: dX is G chains over the columns, added as R2's tree.
        blocks: into how many equal blocks the columns fall that are each shared by all ranks (2: gate and up).
        group: 1, 2, 4 or 8 ranks.

    Returns:
        bf16 [..., N / ranks]. Backward: dx is the same on every rank, and the same bits for any number of ranks.

    Raises:
        ValueError: unsupported dtype, shape, or segments that do not cut the columns into even parts.
    """
    op, ranks = "column_linear", dist.get_world_size(group)
    check_bf16(op, x=x, w=w, bias=bias)
    check(segments % ranks == 0, op, f"segments={segments} must be a multiple of the {ranks} ranks")
    check_segments(op, segments // ranks, w.shape[0])
    check(
        w.shape[0] % (blocks * segments // ranks) == 0,
        op,
        f"{w.shape[0]} columns do not divide into {blocks} blocks of {segments // ranks} segments",
    )
    return _ColumnLinear.apply(x.contiguous(), w, bias, segments, blocks, group)
