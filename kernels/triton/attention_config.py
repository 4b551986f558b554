"""Tiles of the attention kernels. Key blocks and segments are the contract's (R5) and cannot be chosen here.

Head dims are those of the padded tiles: powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENOUGH_PROGRAMS = 264
"""Two for each of an H100's 132 processors: beyond that, splitting keys only adds traffic."""

_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class AttentionConfig:
    """rows: rows (query-major, then head of the group) a program holds, or walks at a time for key gradients."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitConfig:
    """segments: programs that share a tile's keys, one for each segment; 1: one program walks them all."""

    segments: int


def forward_config(rows: int, dim: int, v_dim: int) -> AttentionConfig:
    """``rows``: average rows of a sequence. Decoding takes 16; otherwise two fp32 outputs of [rows, v_dim] are alive."""
    if rows <= 16:
        return segment_config(dim, v_dim)
    if max(dim, v_dim) > 128:
        return AttentionConfig(64, 8, 2)
    return AttentionConfig(64, 4, 2) if v_dim <= 64 else AttentionConfig(128, 8, 2)


def segment_config(dim: int, v_dim: int) -> AttentionConfig:
    """Decoding, split or not: the smallest tile of the matrix unit, keys and values in flight."""
    return AttentionConfig(16, 4, 2 if max(dim, v_dim) <= 128 else 1)


def merge_config() -> AttentionConfig:
    """Two fp32 outputs of [rows, v_dim] are alive; nothing is computed between loads."""
    return AttentionConfig(4, 4, 1)


def split_config(tokens: int, heads: int, kv_heads: int, v_dim: int, sequences: int, segments: int) -> SplitConfig:
    """Split the keys of ``tokens`` queries over ``segments`` programs where decoding would leave processors idle.

    Both ways give the same bits, so the choice may depend on the call (R0). ``segments``: of the longest sequence that
    the page table has room for.
    """
    rows = tokens * heads // kv_heads
    decoding = rows <= 16 * sequences
    programs = (rows // 16 + sequences) * kv_heads
    scratch = 4 * segments * tokens * heads * (v_dim + 2)
    split = decoding and programs < _ENOUGH_PROGRAMS and scratch <= _SCRATCH_BYTES
    return SplitConfig(segments if split else 1)


def query_gradient_config(dim: int, v_dim: int) -> AttentionConfig:
    """One fp32 gradient of [rows, dim] is alive."""
    return _backward_config(64, dim, v_dim)


def key_gradient_config(dim: int, v_dim: int) -> AttentionConfig:
    """Fp32 gradients of [64, dim] and [64, v_dim] are alive."""
    return _backward_config(32, dim, v_dim)


def _backward_config(rows: int, dim: int, v_dim: int) -> AttentionConfig:
    widest = max(dim, v_dim)
    return AttentionConfig(rows, 4 if widest <= 64 else 8, 2 if widest <= 128 else 1)


def delta_config() -> AttentionConfig:
    """A thread walks one row; neighbouring dimensions share its cache line."""
    return AttentionConfig(32, 1, 1)
