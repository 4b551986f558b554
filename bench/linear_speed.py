"""Linear layers against torch's fp32 and bf16 products, in one run: python -m zerokl.bench.linear_speed

Goals on a CPU: at M >= 256 at least 85% of torch's fp32 throughput, at M = 1 at least 80% of torch's bf16 one. At
M <= 4 the weight's bytes are the cost: "of reads" is the time that a call takes which reads the same weights, as cold,
with as many threads and does nothing else, over the product's time; "of copy" is the weight's bytes per second over
those that a large copy reads and writes. The goal there is 90%.

Each shape has enough weights that none is still in a cache when its turn comes, as in a model. All are timed in turn,
in bursts of some milliseconds after a burst that is not timed: torch's OpenMP threads spin for a while after each
product, and would take a core from whoever comes next.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear as torch_linear

from zerokl import kernels
from zerokl.bench.machine import describe
from zerokl.kernels.ops._common import ops

# (N, K): the products of a 135M Llama, its output head, and one of an 8B model
SHAPES = [(960, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096)]
ROWS = [1, 4, 32, 256, 1024]
FEW_ROWS = 4
CACHE_BYTES = 1 << 27
BURST_S = 0.02


def burst(call: Callable[[], object]) -> float:
    """Mean seconds of a call over one burst."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < BURST_S:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call, taken in turn so that a drift of the machine meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, log in zip(calls, times, strict=True):
            burst(call)
            log.append(burst(call))
    return [statistics.median(t) for t in times]


def products(m: int, n: int, k: int) -> list[Callable[[], object]]:
    """Ours, the weight merely read, torch's fp32 and torch's bf16 product, each on the next weight at every call."""
    x = torch.randn(m, k).bfloat16()
    wide = x.float()
    weights = [torch.randn(n, k).bfloat16() for _ in range(max(1, CACHE_BYTES // (2 * n * k)))]
    widened = [w.float() for w in weights]
    ours, read, theirs = (itertools.cycle(weights) for _ in range(3))
    fp32, word = itertools.cycle(widened), torch.empty(1, dtype=torch.int32)
    return [
        lambda: kernels.linear(x, next(ours)),
        lambda: ops.read(next(read), word),
        lambda: torch_linear(wide, next(fp32)),
        lambda: torch_linear(x, next(theirs)),
    ]


def copy_bandwidth() -> float:
    """Bytes per second that torch's copy of a tensor larger than the caches reads and writes."""
    source, target = (torch.ones(CACHE_BYTES, dtype=torch.uint8) for _ in range(2))
    (copied,) = seconds([lambda: target.copy_(source)], rounds=7)
    return 2 * CACHE_BYTES / copied


def main() -> None:
    """Print one line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--few", action="store_true", help="M <= 4 alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copy = copy_bandwidth()
    print(describe())
    print(f"a copy reads and writes {copy / 1e9:.1f} GB/s")
    print(
        f"{'N':>6} {'K':>5} {'M':>5} {'ours':>10} {'GFLOP/s':>8} {'GB/s':>6} {'of copy':>8} {'of reads':>9}"
        f" {'/ torch fp32':>12} {'/ torch bf16':>12}"
    )
    for n, k in SHAPES:
        for m in [m for m in ROWS if m * n * k <= 2**36 and (m <= FEW_ROWS or not options.few)]:
            ours, read, fp32, bf16 = seconds(products(m, n, k), options.rounds)
            few, rate = m <= FEW_ROWS, 2 * n * k / ours
            of_copy, of_reads = (f"{rate / copy:.0%}", f"{read / ours:.0%}") if few else ("-", "-")
            print(
                f"{n:6} {k:5} {m:5} {ours * 1e6:8.0f}us {2 * m * n * k / ours / 1e9:8.1f} {rate / 1e9:6.1f}"
                f" {of_copy:>8} {of_reads:>9} {fp32 / ours:11.2f}x {bf16 / ours:11.2f}x"
            )


if __name__ == "__main__":
    main()
