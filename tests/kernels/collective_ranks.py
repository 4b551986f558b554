"""Run in processes of their own: `python collective_ranks.py RANK RANKS FOLDER`. Tensor parallelism over gloo."""

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from data import hashed

from zerokl import kernels

SEGMENTS = 8
WIDTH = SEGMENTS * 6


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
    np.savez(folder / f"{rank}.npz", total=total.detach().numpy(), dx=local.grad.float().numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
