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


def check_distinct(op: str, index: torch.Tensor) -> None:
    """RuntimeError if a row of index [rows, k] names something twice. Asynchronous like :func:`check_index`."""
    ordered = index.sort(dim=1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).all()
    torch.ops.aten._assert_async.msg(distinct, f"zerokl::{op}: a row names an index twice")


def check_offsets(op: str, offsets: torch.Tensor, rows: int) -> None:
    """RuntimeError unless offsets rise from 0 to ``rows``, or stay. Asynchronous like :func:`check_index`."""
    rising = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0) & (offsets[-1] == rows)
    torch.ops.aten._assert_async.msg(rising, f"zerokl::{op}: offsets must run from 0 to {rows} and never fall")
