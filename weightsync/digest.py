"""The digest both sides of a weight transfer compare: xxh3_128 over a tensor's bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in memory order, without a copy. Raises ValueError unless it is contiguous and on the CPU."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"need a contiguous CPU tensor, got {tuple(tensor.shape)} on {tensor.device}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: torch.Tensor) -> str:
    """xxh3_128 of the tensor's bytes, as 32 hex digits. Shape and dtype are compared separately."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def combined(digests: Mapping[str, str]) -> str:
    """One digest over all names and digests, in the order of the names."""
    state = xxhash.xxh3_128()
    for name in sorted(digests):
        state.update(f"{name}={digests[name]}\n".encode())
    return state.hexdigest()
