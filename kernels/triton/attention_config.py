"""Tiles of the attention kernels. Key blocks and segments are the contract's (R5) and cannot be chosen here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionConfig:
    """rows: rows (query-major, then head of the group) a program holds, or walks at a time for key gradients."""

    rows: int
    num_warps: int
    num_stages: int


def forward_config(rows: int, dim: int) -> AttentionConfig:
    """``rows``: average rows of a sequence. Decoding takes 16; otherwise two fp32 outputs of [rows, dim] are alive."""
    if rows <= 16:
        return AttentionConfig(16, 4, 2)
    return AttentionConfig(64, 4, 2) if dim <= 64 else AttentionConfig(128, 8, 2)


def query_gradient_config(dim: int) -> AttentionConfig:
    """One fp32 gradient of [rows, dim] is alive."""
    return AttentionConfig(64, 4 if dim <= 64 else 8, 2)


def key_gradient_config(dim: int) -> AttentionConfig:
    """Two fp32 gradients of [64, dim] are alive."""
    return AttentionConfig(32, 4 if dim <= 64 else 8, 2)


def delta_config() -> AttentionConfig:
    """A thread walks one row; neighbouring dimensions share its cache line."""
    return AttentionConfig(32, 1, 1)
