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
    """rows: rows (query-major, then head of the group) that a program holds."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class KeyGradientConfig:
    """keys: keys that a program owns; rows: query rows that it walks at a time."""

    keys: int
    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitConfig:
    """segments: programs that share a tile's keys, one for each segment; 1: one program walks them all."""

    segments: int


def forward_config(rows: int, dim: int, v_dim: int, blackwell: bool) -> AttentionConfig:
    """``rows``: average rows of a sequence. Decoding takes 16.

    Two fp32 outputs of [rows, v_dim] are alive. The loop over keys holds one of them and spills nothing; the other may
    wait in local memory for the end of a segment. What fits depends on where the matrix unit keeps its sums.
    """
    if rows <= 16:
        return segment_config()
    if v_dim > 128:
        return AttentionConfig(32, 8, 2)
    if max(dim, v_dim) <= 64:
        return AttentionConfig(64, 4, 2)
    return AttentionConfig(64 if blackwell else 128, 8, 2)


def segment_config() -> AttentionConfig:
    """Decoding, split or not: the smallest tile of the matrix unit."""
    return AttentionConfig(16, 4, 2)


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
    """One fp32 gradient of [rows, dim] is alive. A warp takes 16 rows: fewer would be computed twice."""
    widest = max(dim, v_dim)
    if widest <= 64:
        return AttentionConfig(64, 4, 2)
    return AttentionConfig(128 if widest <= 128 else 32, 8, 2)


def key_gradient_config(dim: int, v_dim: int) -> KeyGradientConfig:
    """Fp32 gradients of [keys, dim] and [keys, v_dim] are alive, so 128 keys leave room for few rows."""
    widest = max(dim, v_dim)
    if widest <= 64:
        return KeyGradientConfig(64, 32, 4, 2)
    return KeyGradientConfig(128, 16, 8, 2) if widest <= 128 else KeyGradientConfig(32, 32, 8, 2)


def delta_config() -> AttentionConfig:
    """A thread walks one row; neighbouring dimensions share its cache line."""
    return AttentionConfig(32, 1, 1)
