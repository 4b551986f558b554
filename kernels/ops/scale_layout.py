"""Where GPUs want fp8_block scales: MN-major, each column starting on 16 bytes, as TMA loads them. Bits do not change.

The layouts are those of DeepGEMM (DeepSeek-AI, 2025): ``get_mn_major_tma_aligned_tensor`` and
``get_mn_major_tma_aligned_packed_ue8m0_tensor``.
"""

from __future__ import annotations

import torch

from ._common import check

_ALIGNED = 16 // 4  # 4-byte elements in TMA's 16 bytes


def _mn_major(x: torch.Tensor) -> torch.Tensor:
    """x [..., MN, K] with MN contiguous and K strided by MN rounded up to 16 bytes; the gap holds zeros."""
    mn = x.shape[-2]
    columns = torch.zeros((*x.shape[:-2], x.shape[-1], -(-mn // _ALIGNED) * _ALIGNED), dtype=x.dtype, device=x.device)
    columns[..., :mn] = x.mT
    return columns.mT[..., :mn, :]


def _check_scales(op: str, scales: torch.Tensor, dtype: torch.dtype) -> None:
    check(
        scales.dtype == dtype and scales.dim() >= 2,
        op,
        f"scales are {scales.dtype} {tuple(scales.shape)}; supported: {dtype} [..., MN, K blocks]",
    )


def to_hopper_scales(scales: torch.Tensor) -> torch.Tensor:
    """fp32 scales [..., MN, blocks] with the same shape and values, MN-major, columns 16-byte aligned (Hopper).

    Raises ValueError for an unsupported dtype or shape.
    """
    _check_scales("to_hopper_scales", scales, torch.float32)
    return _mn_major(scales)


def from_hopper_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_hopper_scales`: row-major scales. Raises ValueError for a wrong dtype or shape."""
    _check_scales("from_hopper_scales", scales, torch.float32)
    return scales.clone(memory_format=torch.contiguous_format)


def to_blackwell_scales(scales: torch.Tensor) -> torch.Tensor:
    """Power-of-two fp32 scales [..., MN, blocks] as UE8M0, four blocks to an int32, the first in the lowest byte.

    Returns int32 [..., MN, ceil(blocks / 4)], MN-major, columns 16-byte aligned; missing blocks are zero bytes, a
    NaN scale is 0xff. Raises ValueError for an unsupported dtype or shape, or a scale that is not a power of two.
    """
    op = "to_blackwell_scales"
    _check_scales(op, scales, torch.float32)
    bits = scales.contiguous().view(torch.int32)
    nan = scales.isnan()
    check(
        bool((nan | ((bits & 0x7FFFFF == 0) & (bits > 0) & (bits < 0x7F800000))).all()),
        op,
        "scales must be powers of two; quantise with power_of_two=True",
    )
    exponents = torch.where(nan, 0xFF, bits >> 23).to(torch.uint8)
    padded = torch.nn.functional.pad(exponents, (0, -scales.shape[-1] % 4))
    return _mn_major(padded.view(torch.int32))


def from_blackwell_scales(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of :func:`to_blackwell_scales`: fp32 [..., MN, blocks]. Raises ValueError for what does not fit."""
    op = "from_blackwell_scales"
    _check_scales(op, packed, torch.int32)
    check(-(-blocks // 4) == packed.shape[-1], op, f"blocks={blocks} do not fit packed {tuple(packed.shape)}")
    exponents = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)[..., :blocks].to(torch.int32)
    return torch.where(exponents == 0xFF, 0x7FC00000, exponents << 23).to(torch.int32).view(torch.float32)
