"""Quantisers, each under its own name (CONTRACT.md, Quantisers).

fp8_block: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3. mxfp8: OCP Microscaling Formats (MX)
Specification v1.0, 2023; Mishra et al., "Recipes for Pre-training LLMs with MXFP8", 2025 (RCEIL). int4_group: symmetric
weight groups as in Frantar et al., "GPTQ", 2022, with the scale rounded before the codes.

A block, whose elements share a scale, that holds a NaN or an Inf has a NaN scale and dequantises to NaN throughout:
it can neither vanish nor reach another block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, overload

import torch

from .. import contract
from ._common import check, check_bf16, check_device, needs_grad, ops


class Fp8Block(NamedTuple):
    """codes float8_e4m3fn [..., K]; scales fp32 [..., ceil(K / 128)], for (128, 128) [ceil(N / 128), ceil(K / 128)]."""

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]


class Mxfp8(NamedTuple):
    """codes float8_e4m3fn [..., K]; scales float8_e8m0fnu [..., K / 32]."""

    codes: torch.Tensor
    scales: torch.Tensor


class Int4Group(NamedTuple):
    """codes int32 [..., K / 8], eight nibbles each, the first lowest, +8; scales bf16 [..., K / group]."""

    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class _Format:
    """One quantiser as the compiled operators know it; quantizer indexes ``enum class Quantizer`` of kernels.h."""

    name: str
    quantizer: int
    rows: int
    columns: int
    scale: torch.dtype
    code: torch.dtype = torch.float8_e4m3fn
    values_per_code: int = 1
    whole_blocks: bool = True

    def codes_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.values_per_code)

    def scales_shape(self, shape: torch.Size) -> tuple[int, ...]:
        blocks = -(-shape[-1] // self.columns)
        return (*shape[:-1], blocks) if self.rows == 1 else (-(-shape[0] // self.rows), blocks)


def _fp8(block: tuple[int, int], power_of_two: bool, op: str) -> _Format:
    edge = contract.FP8_BLOCK
    check(tuple(block) in ((1, edge), (edge, edge)), op, f"block={block}; supported: (1, {edge}), ({edge}, {edge})")
    return _Format("fp8_block", int(power_of_two), *block, torch.float32, whole_blocks=False)


def _mx(rounding: str, op: str) -> _Format:
    check(rounding in ("rceil", "floor"), op, f"rounding={rounding!r}; supported: 'rceil', 'floor'")
    return _Format("mxfp8", 2 + (rounding == "floor"), 1, contract.MX_BLOCK, torch.float8_e8m0fnu)


def _int4(group: int, op: str) -> _Format:
    check(group in (32, 128), op, f"group={group}; supported: 32, 128")
    return _Format("int4_group", 4, 1, group, torch.bfloat16, torch.int32, 8)


Codes = tuple[torch.Tensor, torch.Tensor]


def _bytes(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as the operators take them: they see bytes, whatever the dtype."""
    # a lone element counts as contiguous whatever its stride, but could not be viewed as bytes
    return [t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in tensors]


def _quantize(tensors: Sequence[torch.Tensor], f: _Format, op: str) -> list[Codes]:
    """Codes and scales of all tensors in one parallel launch."""
    for x in tensors:
        check_bf16(op, x=x)
        first = tensors[0].device
        check(x.device == first, op, f"x has tensors on {first} and {x.device}; supported: one device")
        check(
            x.dim() == 2 if f.rows > 1 else x.dim() >= 1,
            op,
            f"x {tuple(x.shape)} must be {'[N, K]' if f.rows > 1 else '[..., K]'}",
        )
        check(
            x.shape[-1] > 0 and not (f.whole_blocks and x.shape[-1] % f.columns),
            op,
            f"x {tuple(x.shape)} must end in a positive {f'multiple of {f.columns}' if f.whole_blocks else 'size'}",
        )
    codes = [torch.empty(f.codes_shape(x.shape), dtype=f.code, device=x.device) for x in tensors]
    scales = [torch.empty(f.scales_shape(x.shape), dtype=f.scale, device=x.device) for x in tensors]
    if tensors:  # torch cannot tell the type of an empty list
        ops.quantize([x.contiguous() for x in tensors], f.quantizer, f.rows, f.columns, _bytes(codes), _bytes(scales))
    return list(zip(codes, scales, strict=True))


def _check_codes(codes: torch.Tensor, scales: torch.Tensor, f: _Format, op: str) -> tuple[int, ...]:
    """The shape of what codes and scales stand for, if they fit each other and the format."""
    check_device(op, codes=codes, scales=scales)
    check(codes.dtype == f.code and codes.dim() >= 1, op, f"codes are {codes.dtype}; supported: {f.code} [..., K]")
    check(scales.dtype == f.scale, op, f"scales are {scales.dtype}; supported: {f.scale}")
    shape = torch.Size((*codes.shape[:-1], codes.shape[-1] * f.values_per_code))
    check(f.rows == 1 or len(shape) == 2, op, f"codes {tuple(codes.shape)} must be [N, K]")
    check(
        not (f.whole_blocks and shape[-1] % f.columns) and scales.shape == f.scales_shape(shape),
        op,
        f"scales {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}",
    )
    return shape


def _dequantize(codes: torch.Tensor, scales: torch.Tensor, f: _Format, op: str) -> torch.Tensor:
    shape = _check_codes(codes, scales, f, op)
    x = torch.empty(shape, dtype=torch.bfloat16, device=codes.device)
    ops.dequantize(_bytes([codes]), _bytes([scales]), f.quantizer, f.rows, f.columns, [x])
    return x


class _StraightThrough(torch.autograd.Function):
    """``fake(x)`` forward, the identity backward (Bengio et al., 2013)."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, fake: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return fake(x)

    @staticmethod
    def backward(_: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


def _fake_quantize(x: torch.Tensor, f: _Format, op: str) -> torch.Tensor:
    def fake(x: torch.Tensor) -> torch.Tensor:
        return _dequantize(*_quantize([x], f, op)[0], f, op)

    return cast(torch.Tensor, _StraightThrough.apply(x, fake)) if needs_grad(x) else fake(x)


@overload
def quantize_fp8_block(x: torch.Tensor, *, block: tuple[int, int], power_of_two: bool = False) -> Fp8Block: ...
@overload
def quantize_fp8_block(
    x: Sequence[torch.Tensor], *, block: tuple[int, int], power_of_two: bool = False
) -> list[Fp8Block]: ...
def quantize_fp8_block(
    x: torch.Tensor | Sequence[torch.Tensor], *, block: tuple[int, int], power_of_two: bool = False
) -> Fp8Block | list[Fp8Block]:
    """e4m3 codes with an fp32 scale per block: ``scale = max(amax, 1e-4) / 448``, ``code = e4m3(x (1 / scale))``.

    Args:
        x: bf16 [..., K] for (1, 128), [N, K] for (128, 128); or a sequence of those, quantised in one parallel launch.
            K and N need not be multiples: blocks at the edges are narrower.
        block: (1, 128) for activations, (128, 128) for weights.
        power_of_two: round the scale up to a power of two, by its exponent bits (what UE8M0 scales hold).

    Returns:
        :class:`Fp8Block`, or a list of them. No gradient; see :func:`fake_quantize_fp8_block`.

    Raises:
        ValueError: unsupported dtype, shape or block.
    """
    op = "quantize_fp8_block"
    f = _fp8(block, power_of_two, op)
    if isinstance(x, torch.Tensor):
        return Fp8Block(*_quantize([x], f, op)[0], (f.rows, f.columns))
    return [Fp8Block(*q, (f.rows, f.columns)) for q in _quantize(x, f, op)]


def dequantize_fp8_block(q: Fp8Block) -> torch.Tensor:
    """bf16 of the codes' shape: ``code scale`` rounded to fp32, then to bf16. Raises ValueError for misfits."""
    op = "dequantize_fp8_block"
    return _dequantize(q.codes, q.scales, _fp8(q.block, False, op), op)


def fake_quantize_fp8_block(x: torch.Tensor, *, block: tuple[int, int], power_of_two: bool = False) -> torch.Tensor:
    """Quantise and dequantise, with the identity as gradient. Arguments and errors as :func:`quantize_fp8_block`."""
    op = "fake_quantize_fp8_block"
    return _fake_quantize(x, _fp8(block, power_of_two, op), op)


@overload
def quantize_mxfp8(x: torch.Tensor, *, rounding: str = "rceil") -> Mxfp8: ...
@overload
def quantize_mxfp8(x: Sequence[torch.Tensor], *, rounding: str = "rceil") -> list[Mxfp8]: ...
def quantize_mxfp8(x: torch.Tensor | Sequence[torch.Tensor], *, rounding: str = "rceil") -> Mxfp8 | list[Mxfp8]:
    """MXFP8: e4m3 codes with one E8M0 scale, a power of two, for each 32 elements.

    Args:
        x: bf16 [..., K], K a multiple of 32; or a sequence of those, quantised in one parallel launch.
        rounding: how the scale's exponent follows the block. "rceil": amax / 448 up to a power of two, so nothing
            saturates. "floor", the OCP default: the exponent of amax less 8, so values above 448 scales saturate.

    Returns:
        :class:`Mxfp8`, or a list of them. No gradient; see :func:`fake_quantize_mxfp8`.

    Raises:
        ValueError: unsupported dtype, shape or rounding.
    """
    op = "quantize_mxfp8"
    f = _mx(rounding, op)
    if isinstance(x, torch.Tensor):
        return Mxfp8(*_quantize([x], f, op)[0])
    return [Mxfp8(*q) for q in _quantize(x, f, op)]


def dequantize_mxfp8(q: Mxfp8) -> torch.Tensor:
    """bf16 of the codes' shape; exact unless it leaves bf16's range. Raises ValueError for what does not fit."""
    op = "dequantize_mxfp8"
    return _dequantize(q.codes, q.scales, _mx("rceil", op), op)


def fake_quantize_mxfp8(x: torch.Tensor, *, rounding: str = "rceil") -> torch.Tensor:
    """Quantise and dequantise, with the identity as gradient. Arguments and errors as :func:`quantize_mxfp8`."""
    op = "fake_quantize_mxfp8"
    return _fake_quantize(x, _mx(rounding, op), op)


@overload
def quantize_int4_group(x: torch.Tensor, *, group: int) -> Int4Group: ...
@overload
def quantize_int4_group(x: Sequence[torch.Tensor], *, group: int) -> list[Int4Group]: ...
def quantize_int4_group(x: torch.Tensor | Sequence[torch.Tensor], *, group: int) -> Int4Group | list[Int4Group]:
    """Symmetric INT4: ``scale = bf16(max(amax / 7, 1e-5))``, ``code = round(x / scale)`` in [-8, 7], packed by eights.

    One rule for training and for export: codes are computed from the scale that is stored.

    Args:
        x: bf16 [..., K], K a multiple of group; or a sequence of those, quantised in one parallel launch.
        group: 32 or 128 elements to a scale.

    Returns:
        :class:`Int4Group`, or a list of them. No gradient; see :func:`fake_quantize_int4_group`.

    Raises:
        ValueError: unsupported dtype, shape or group.
    """
    op = "quantize_int4_group"
    f = _int4(group, op)
    if isinstance(x, torch.Tensor):
        return Int4Group(*_quantize([x], f, op)[0])
    return [Int4Group(*q) for q in _quantize(x, f, op)]


def _int4_of(q: Int4Group, op: str) -> _Format:
    """The format of given codes."""
    check(q.codes.dim() >= 1 and q.scales.dim() >= 1 and q.scales.shape[-1] > 0, op, "codes or scales are empty")
    return _int4(q.codes.shape[-1] * 8 // q.scales.shape[-1], op)


def check_int4(q: Int4Group, op: str) -> tuple[int, ...]:
    """The shape of what q stands for. Raises ValueError for what does not fit."""
    return _check_codes(q.codes, q.scales, _int4_of(q, op), op)


def dequantize_int4_group(q: Int4Group) -> torch.Tensor:
    """bf16 [..., K]: ``code scale``, rounded once. Raises ValueError for what does not fit."""
    op = "dequantize_int4_group"
    return _dequantize(q.codes, q.scales, _int4_of(q, op), op)


def fake_quantize_int4_group(x: torch.Tensor, *, group: int) -> torch.Tensor:
    """Quantise and dequantise, with the identity as gradient. Arguments and errors as :func:`quantize_int4_group`."""
    op = "fake_quantize_int4_group"
    return _fake_quantize(x, _int4(group, op), op)
