"""Choose the tiles of linear layers on this GPU: python -m zerokl.bench.autotune [--seconds 300]

Every candidate's output is compared with the heuristic's byte by byte before its time counts; one that differs is a
fault in the contract's claim that tiles are free: it is named, never chosen, and the exit code is 1. The table goes to
kernels/triton/tuned.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from zerokl.bench.machine import versions
from zerokl.bench.regression.case import hashed
from zerokl.kernels.triton.linear_config import LinearConfig, linear_config

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "triton" / "tuned.py"
LAYERS = ((6144, 1024), (4096, 1024), (1024, 3072), (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
SHARED_MEMORY = 227 << 10


@dataclass(frozen=True)
class Choice:
    """The fastest configuration, its time, the heuristic's time, and the candidates whose bytes differed."""

    config: LinearConfig
    seconds: float
    heuristic_seconds: float
    unequal: tuple[LinearConfig, ...]


def candidates(m: int, n: int) -> list[LinearConfig]:
    """The heuristic's tiles first, then every combination that fits the chip's shared memory and registers."""
    made = [linear_config(m, n, 1)]
    tallest = max(16, min(256, 1 << max(0, m - 1).bit_length()))
    for block_m, block_n, block_k, warps, stages in itertools.product(
        (16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        shared = stages * (block_m + block_n) * block_k * 2
        accumulators = block_m * block_n // (32 * warps)
        if block_m <= tallest and shared <= SHARED_MEMORY and 8 <= accumulators <= 128:
            made.append(LinearConfig(block_m, block_n, block_k, 8 if m > 256 else 1, warps, stages))
    return list(dict.fromkeys(made))


def choose(
    configs: Iterable[LinearConfig],
    run: Callable[[LinearConfig], torch.Tensor | None],
    seconds: Callable[[LinearConfig], float],
    deadline: float,
) -> Choice:
    """The fastest of the byte-equal ones seen before ``deadline``; the first is what the others must equal.

    ``run`` gives None for a configuration that the chip cannot hold.
    """
    first, *rest = configs
    wanted = run(first)
    if wanted is None:
        raise RuntimeError(f"the heuristic's own tiles do not fit this GPU: {first}")
    best, heuristic = first, seconds(first)
    least, unequal = heuristic, []
    for config in rest:
        if time.monotonic() > deadline:
            break
        output = run(config)
        if output is None:
            continue
        if not torch.equal(output.view(torch.int16), wanted.view(torch.int16)):
            unequal.append(config)
            continue
        taken = seconds(config)
        if taken < least:
            best, least = config, taken
    return Choice(best, least, heuristic, tuple(unequal))


def write_table(chosen: dict[tuple[int, int, int], LinearConfig], about: str, path: Path) -> None:
    """The table as a Python file that says where it comes from."""
    lines = [
        '"""Tiles that a tuning run chose (written by `python -m zerokl.bench.autotune`); others: `linear_config`.',
        "",
        "Tiles change speed, never bits: every entry was byte-equal to the heuristic's when it was chosen.",
        f'{about}\n"""',
        "",
        "from __future__ import annotations",
        "",
        "from .linear_config import LinearConfig",
        "",
        "LINEAR: dict[tuple[int, int, int], LinearConfig] = {",
        *(f"    {shape}: {config}," for shape, config in sorted(chosen.items())),
        "}",
        '"""By (rows rounded up to a power of two, N, K)."""',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="zerokl.bench.autotune", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="time budget, shared by all shapes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch sees: tiles are chosen where they run", file=sys.stderr)
        return 2
    shapes = [(m, n, k) for n, k in LAYERS for m in ROWS]
    chosen, faults = {}, 0
    began = time.monotonic()
    for at, (m, n, k) in enumerate(shapes):
        x, w = hashed(m, k, seed=1).cuda(), hashed(n, k, seed=2).cuda()
        runner = _Runner(x, w)
        choice = choose(candidates(m, n), runner.run, runner.seconds, began + options.seconds * (at + 1) / len(shapes))
        faults += len(choice.unequal)
        gain = choice.heuristic_seconds / choice.seconds
        print(f"{m}x{n}x{k}: {choice.config} {choice.seconds * 1e6:.1f} us, {gain:.2f} x the heuristic", flush=True)
        for config in choice.unequal:
            print(f"  bytes differ: {config}", flush=True)
        if gain > 1.02:
            chosen[m, n, k] = choice.config
    about = ", ".join(f"{name} {number}" for name, number in versions("torch", "triton").items())
    write_table(chosen, f"{torch.cuda.get_device_name()}, {about}.", TABLE)
    return int(faults > 0)


class _Runner:
    """One linear layer on the GPU with tiles of choice."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor) -> None:
        self._x, self._w = x, w
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device=x.device)

    def run(self, config: LinearConfig) -> torch.Tensor | None:
        from triton.runtime.errors import OutOfResources

        from zerokl.kernels.triton.linear import matmul

        y = self._x.new_empty(self._x.shape[0], self._w.shape[0])
        try:
            matmul(self._x, self._w.t(), y, config=config)
        except OutOfResources:
            return None
        return y

    def seconds(self, config: LinearConfig) -> float:
        """The least of ten calls, the cache emptied before each."""
        least = math.inf
        for _ in range(10):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run(config)
            end.record()
            end.synchronize()
            least = min(least, start.elapsed_time(end) * 1e-3)
        return least


if __name__ == "__main__":
    sys.exit(main())
