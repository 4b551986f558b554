"""Ranks forked from a process of their own: `python collective_ranks.py RANKS FOLDER`. Tensor parallelism over gloo."""

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from data import hashed
from torch.multiprocessing import start_processes

from zerokl import kernels

SEGMENTS = 8
WIDTH = SEGMENTS * 6
VOCABULARY = 389  # not a multiple of 8: the last shares are smaller


def logprob_inputs():
    """(hidden with gradient, whole head, targets in every part of the vocabulary)"""
    return hashed(9, 30, seed=4).requires_grad_(), hashed(VOCABULARY, 30, seed=5), torch.arange(9) * 45


def filter_inputs():
    """(hidden with gradient, whole head, targets, top_p, top_k): rows with either filter, with both, with none"""
    hidden, head, targets = logprob_inputs()
    top_p = torch.tensor([0.5, 1.0, 0.9, 1.0, 0.3, 0.7, 1.0, 0.8, 1.0])
    top_k = torch.tensor([0, 3, 20, 0, 0, 7, 200, 1, 0], dtype=torch.int32)
    filtered = (top_p != 1) | (top_k != 0)
    kept = (hidden.detach().float() @ head.float().T).argmax(1)
    return hidden, head, torch.where(filtered, kept, targets), top_p, top_k


def column_inputs():
    """(x with gradient, whole weight and bias of a gate and an up block, gradient of all columns)"""
    bias = hashed(2 * WIDTH, seed=9)
    return hashed(7, 10, seed=6).requires_grad_(), hashed(2 * WIDTH, 10, seed=7), bias, hashed(7, 2 * WIDTH, seed=8)


def share_of_columns(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """This rank's part of the first dimension's two blocks."""
    return torch.cat([block.chunk(ranks)[rank] for block in x.chunk(2)]).contiguous()


def main(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    x, w = hashed(11, WIDTH, seed=1, kind="cancel"), hashed(9, WIDTH, seed=2, kind="wide")
    mine = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
    local = x[:, mine].contiguous().requires_grad_()
    part = kernels.linear(local, w[:, mine].contiguous(), segments=SEGMENTS // ranks, out_dtype=torch.float32)
    total = kernels.tree_all_reduce(part, dist.group.WORLD)
    total.backward(hashed(11, 9, seed=3).float())
    hidden, head, targets = logprob_inputs()
    share = kernels.vocabulary_share(VOCABULARY, rank, ranks)
    shard = head[share].contiguous().requires_grad_()
    scored = kernels.selected_logprob(
        hidden, shard, targets, temperature=0.7, entropy=True, group=dist.group.WORLD, vocabulary=VOCABULARY
    )
    scored.logprob.backward(torch.arange(len(targets)).float() - 3)
    chosen, head, targets, top_p, top_k = filter_inputs()
    shard_of_chosen = head[share].contiguous().requires_grad_()
    filtered = kernels.selected_logprob(
        chosen, shard_of_chosen, targets, temperature=0.7, top_p=top_p, top_k=top_k, entropy=True,
        group=dist.group.WORLD, vocabulary=VOCABULARY,
    )  # fmt: skip
    filtered.logprob.backward(torch.arange(len(targets)).float() - 3)
    columns, weight, bias, dy = column_inputs()
    own, shift = (share_of_columns(x, rank, ranks).requires_grad_() for x in (weight, bias))
    y = kernels.column_linear(columns, own, shift, segments=SEGMENTS, blocks=2, group=dist.group.WORLD)
    y.backward(share_of_columns(dy.t(), rank, ranks).t())
    np.savez(
        folder / f"{rank}.npz", total=total.detach().numpy(), dx=local.grad.float().numpy(),
        logprob=scored.logprob.detach().numpy(), entropy=scored.entropy.numpy(),
        filtered=filtered.logprob.detach().numpy(), filtered_entropy=filtered.entropy.numpy(),
        dchosen=chosen.grad.float().numpy(), dhead_of_chosen=shard_of_chosen.grad.float().numpy(),
        dhidden=hidden.grad.float().numpy(), dhead=shard.grad.float().numpy(),
        columns=y.detach().float().numpy(), dcolumns=columns.grad.float().numpy(), down=own.grad.float().numpy(),
        dshift=shift.grad.float().numpy(),
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    start_processes(main, (ranks, folder), nprocs=ranks, start_method="fork")
