"""Sums over ranks: the upper levels of R2's tree."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ._common import check


class _TreeAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _tree(x, group)

    @staticmethod
    def backward(_ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


def _tree(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Recursive doubling: after level l every rank holds the sum of the 2^(l + 1) neighbours it belongs to.

    Both partners add the same two numbers, and an IEEE sum does not depend on their order: equal bits on all ranks.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total, other = x.detach().clone(), torch.empty_like(x)
    for distance in (1 << level for level in range(ranks.bit_length() - 1)):
        partner = dist.get_global_rank(group, rank ^ distance)
        exchange = [
            dist.P2POp(dist.isend, total, partner, group=group),
            dist.P2POp(dist.irecv, other, partner, group=group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        total = total + other
    return total


def tree_all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of x over the ranks of a group as R2's balanced tree, in fp32, with the same bits on every rank.

    Where each of t ranks holds the subtree of its G / t neighbouring segments, the result equals ``linear`` with G
    segments on one rank. Neighbours in rank order are neighbours in the tree.

    Args:
        x: fp32, contiguous, the same shape on every rank.
        group: a process group of 1, 2, 4, 8, ... ranks (gloo or NCCL).

    Returns:
        fp32 like x. Backward is the identity: the sum is replicated, so every rank already has its whole gradient
        (Shoeybi et al., "Megatron-LM", 2019, operator g).

    Raises:
        ValueError: another dtype or layout, or a number of ranks that is no power of two. The process group's own
        timeout bounds every wait.
    """
    op, ranks = "tree_all_reduce", dist.get_world_size(group)
    check(x.dtype == torch.float32 and x.is_contiguous(), op, f"x is {x.dtype}; supported: contiguous fp32")
    check(ranks & (ranks - 1) == 0, op, f"{ranks} ranks; supported: powers of two")
    return _TreeAllReduce.apply(x, group)
