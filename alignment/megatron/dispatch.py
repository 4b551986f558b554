"""Expert parallelism: rows travel to the rank that holds their expert, and back to their own for the combination.

An expert's rows stand in the order (rank they come from, token, slot); by row locality (contract R0) their bits do not
depend on it, and weights' gradients add them in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Route(NamedTuple):
    """One layer's exchange. sent, received: rows to and from each rank; order, back int64 [R]: received rows by expert,
    and the reverse; offsets int64 [own experts + 1]: where each own expert's rows begin."""

    sent: list[int]
    received: list[int]
    order: torch.Tensor
    back: torch.Tensor
    offsets: torch.Tensor


def route(offsets: torch.Tensor, group: dist.ProcessGroup) -> Route:
    """From the rows that this rank's tokens send to every expert, int64 [E + 1] ascending. Every rank must call it."""
    ranks = group.size()
    counts = offsets.diff().view(ranks, -1)  # [rank that holds the experts, its experts]
    mine = torch.empty_like(counts)  # [rank the rows come from, own experts]
    dist.all_to_all_single(mine, counts.contiguous(), group=group)
    expert = torch.arange(mine.shape[1], device=mine.device).repeat(ranks).repeat_interleave(mine.flatten())
    order = expert.argsort(stable=True)
    starts = torch.cat([mine.new_zeros(1), mine.sum(0).cumsum(0)])
    return Route(counts.sum(1).tolist(), mine.sum(1).tolist(), order, order.argsort(), starts)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.back = (sent, received, group)
        return _exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(dy, *ctx.back), None, None, None


def _exchange(x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = x.new_empty(sum(received), x.shape[1])
    dist.all_to_all_single(out, x.detach().contiguous(), received, sent, group=group)
    return out


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return dy.index_select(0, ctx.back), None, None


def dispatch(rows: torch.Tensor, route: Route, group: dist.ProcessGroup) -> torch.Tensor:
    """bf16 [rows of this rank's tokens, H], ordered by expert -> the rows of this rank's experts, ordered by expert."""
    return _Reorder.apply(_Exchange.apply(rows, route.received, route.sent, group), route.order, route.back)


def collect(rows: torch.Tensor, route: Route, group: dist.ProcessGroup) -> torch.Tensor:
    """The reverse of `dispatch`."""
    return _Exchange.apply(_Reorder.apply(rows, route.back, route.order), route.sent, route.received, group)
