"""Where tensors change between replicated and split over a group, sums in the fixed order of contract R2 (Korthikanti
et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, for tokens).

Megatron's own ones leave the order of addition to the communication library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from zerokl import kernels


def tree_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks by R2's tree in fp32, rounded once to x's type. No gradient."""
    return kernels.tree_all_reduce(x.detach().float().contiguous(), group).to(x.dtype)


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's x (the same shape on all) one after the other along the first dimension. No gradient."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts)


def own_part(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's equal part of x along the first dimension."""
    return x.chunk(group.size())[group.rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own_part(dy, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return own_part(x, group).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(dy, ctx.group), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        merged = x.detach().clone(memory_format=torch.contiguous_format)
        # as integers: a float sum would turn -0 into +0
        dist.all_reduce(merged.view(torch.int32), group=group)
        return merged

    @staticmethod
    def backward(_ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _tokens_for_heads(x, group)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _heads_for_tokens(dy, ctx.group), None


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _heads_for_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _tokens_for_heads(dy, ctx.group), None


def _tokens_for_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = x.detach().unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()  # [rank, t, heads of the rank, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _heads_for_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = x.detach().unflatten(0, (group.size(), -1)).contiguous()  # [rank, tokens of the rank, h, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.transpose(0, 1).flatten(1, 2).contiguous()


def gather_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Tokens split over ranks -> all of them, on each. The gradient, equal on all ranks, is split again."""
    return x if group.size() == 1 else _Gather.apply(x, group)


def split_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All tokens, the same on each rank -> this rank's. The gradients are gathered."""
    return x if group.size() == 1 else _Split.apply(x, group)


def tokens_for_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[own tokens, all heads, D] -> [all tokens, own heads, D] (Jacobs et al., "DeepSpeed Ulysses", 2023)."""
    return x if group.size() == 1 else _TokensForHeads.apply(x, group)


def heads_for_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The reverse: [all tokens, own heads, D] -> [own tokens, all heads, D]."""
    return x if group.size() == 1 else _HeadsForTokens.apply(x, group)


def merge_disjoint(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The exact union of tensors of which, at each element, at most one rank's is not all zero bits.

    Every rank has the whole gradient. The last dimension must hold whole multiples of four bytes.
    """
    return x if group.size() == 1 else _Merge.apply(x, group)


def embedding(tokens: torch.Tensor, weight: torch.Tensor, vocabulary: int, group: dist.ProcessGroup) -> torch.Tensor:
    """`kernels.embedding` of int64 [T] whose table's rows the group shares: the same bits and, per row, gradients.

    Raises RuntimeError for a token outside [0, vocabulary).
    """
    if group.size() == 1:
        return kernels.embedding(tokens, weight)
    if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
        raise RuntimeError(f"a token id lies outside [0, {vocabulary})")
    share = kernels.vocabulary_share(vocabulary, group.rank(), group.size())
    mine = ((tokens >= share.start) & (tokens < share.stop)).nonzero()[:, 0]
    rows = kernels.embedding(tokens[mine] - share.start, weight)
    return merge_disjoint(rows.new_zeros(len(tokens), weight.shape[1]).index_copy(0, mine, rows), group)
