"""What this machine can do at most, measured: bytes a second of a copy, operations a second of torch's best product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bounds:
    """``bytes_per_s``: read plus written, of a copy larger than any cache; ``flops_per_s``: a large bf16 product."""

    bytes_per_s: float
    flops_per_s: float


def measure(device: torch.device) -> Bounds:
    """Medians of seven rounds each."""
    size = 1 << 28 if device.type == "cpu" else 1 << 31
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    copy = _seconds(lambda: target.copy_(source), device)
    product = min(_seconds(lambda: a @ b, device), _seconds(lambda: a @ b.T, device))
    return Bounds(2 * size / copy, 2 * n**3 / product)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(8):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
