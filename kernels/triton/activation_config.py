"""Launch shape of the elementwise kernels; nothing here can change a bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationConfig:
    """block: columns a program owns."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class WeightedConfig:
    """rows: whole rows that a program of the row weights' gradient holds side by side."""

    rows: int
    num_warps: int


def activation_config(width: int) -> ActivationConfig:
    """Eight bf16 (16 bytes) a thread where the row is long enough."""
    return ActivationConfig(block=1024, num_warps=4) if width >= 1024 else ActivationConfig(block=256, num_warps=1)


def weighted_config() -> WeightedConfig:
    """One warp per row: a group of 128 lanes is four bf16 (8 bytes) a thread."""
    return WeightedConfig(rows=4, num_warps=4)
