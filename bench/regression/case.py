"""A case of the GPU regression: one op on fixed data, what it must equal, what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on data from an integer hash.

    ``run`` maps inputs to outputs; ``cross_device``: the contract gives the same bits on CPU and GPU, otherwise the
    outputs are close. ``rows``: the first input's rows are independent (R0). ``cuda_part``: on a GPU it needs the
    extension's CUDA part. ``torch_run``: what a user would call.
    """

    name: str
    inputs: Callable[[], Tensors]
    run: Callable[..., Tensors]
    cross_device: bool
    rows: bool = False
    torch_run: Callable[..., object] | None = None
    gigabytes: float = 0.0
    teraflops: float = 0.0
    cuda_part: bool = False


def hashed(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """bf16 in (-scale, scale) from an integer hash: the same bytes on every machine."""
    n = torch.Size(shape).numel()
    i = torch.arange(n, dtype=torch.int64) + (seed << 32)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        i = (i ^ (i >> shift)) * factor
    unit = ((i >> 31) & 0xFFFFFF).float() / 2.0**23 - 1.0
    return (unit * scale).reshape(shape).bfloat16()
