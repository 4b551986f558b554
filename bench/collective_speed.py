"""The ops of several ranks against what a user would otherwise call: python -m zerokl.bench.collective_speed

tree_all_reduce against all_reduce, column_linear against torch's product. Gloo on a CPU; the bounds are one process's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zerokl import kernels
from zerokl.bench.kernels.bounds import Bounds, measure
from zerokl.bench.machine import describe

OPS = ("tree_all_reduce", "column_linear")
ROUNDS = 9


def seconds(call: Callable[[], object]) -> float:
    """Median of a call that all ranks begin together; the first is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def line(name: str, ours: float, theirs: float, size: float, flops: float, bounds: Bounds) -> str:
    """Time, rates, share of the bound, ratio: the columns of bench/kernels."""
    least = max(size / bounds.bytes_per_s, flops / bounds.flops_per_s)
    return (
        f"{name:46} {ours * 1e6:9.1f} {size / ours / 1e9:7.2f} {flops / ours / 1e12:7.3f} {least / ours:8.0%} "
        f"{theirs / ours:8.2f}"
    )


def rank_main(rank: int, ranks: int, folder: str, rows: int, width: int, bounds: Bounds) -> None:
    """Time both ops on one rank; rank 0 prints."""
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    group = dist.group.WORLD
    assert group is not None
    x, inputs = torch.randn(rows, width), torch.randn(rows, width).bfloat16()
    w = torch.randn(4 * width // ranks, width).bfloat16()
    results = [
        ("tree_all_reduce", lambda: kernels.tree_all_reduce(x, group), lambda: dist.all_reduce(x.clone()),
         8.0 * rows * width, 0.0),
        ("column_linear", lambda: kernels.column_linear(inputs, w, segments=ranks, group=group),
         lambda: inputs @ w.T, 2.0 * w.numel(), 2.0 * rows * w.numel()),
    ]  # fmt: skip
    for name, ours, theirs, size, flops in results:
        mine, other = seconds(ours), seconds(theirs)
        if rank == 0:
            print(line(f"{name} {ranks} ranks {rows}x{width}", mine, other, size, flops, bounds), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Print one line for each op and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    options = parser.parse_args()
    bounds = measure(torch.device("cpu"))
    print(describe())
    print(f"bounds: copy {bounds.bytes_per_s / 1e9:.1f} GB/s, bf16 product {bounds.flops_per_s / 1e12:.2f} TFLOPS")
    print(f"{'case':46} {'us':>9} {'GB/s':>7} {'TFLOPS':>7} {'of bound':>8} {'x torch':>8}", flush=True)
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (ranks, folder, options.rows, options.width, bounds), nprocs=ranks)


if __name__ == "__main__":
    main()
