"""Range checks on device data (R10)."""

from __future__ import annotations

import torch


def refuse(condition: bool, op: str, what: str) -> None:
    """ValueError where an option has no GPU kernel yet."""
    if condition:
        raise ValueError(f"zerokl.kernels.{op}: {what} has no kernel for cuda yet; supported on cpu")


def check_index(op: str, index: torch.Tensor, size: int) -> None:
    """RuntimeError unless every element lies in [0, size).

    Queued on the stream ahead of the kernel: no synchronisation, so it also works inside a CUDA graph. On a GPU the
    error therefore surfaces at the next synchronisation, and the context is lost with it.
    """
    inside = ((index >= 0) & (index < size)).all()
    torch.ops.aten._assert_async.msg(inside, f"zerokl::{op}: an index lies outside [0, {size})")
