"""Quantisers and their inverses (CONTRACT.md, Quantisers). Cross-device: the bits of ``kernels/cpu/quantize.cpp``.

One launch quantises any number of tensors. A lone tensor's pointers are launch arguments, so nothing is copied to the
device and a CUDA graph may capture the call; several travel as a table.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import contract
from ._codes import ceil_exponent, e4m3_to_f32, e8m0_to_f32, int4_pack, int4_to_f32, scale_to_f32, to_e4m3
from ._math import launch_options, to_bf16, to_f32
from .quantize_config import quantize_config

# enum class Quantizer of kernels.h; below, comparisons tell the families apart
FP8 = tl.constexpr(0)
FP8_POWER_OF_TWO = tl.constexpr(1)
MX_RCEIL = tl.constexpr(2)
MX_FLOOR = tl.constexpr(3)
INT4 = tl.constexpr(4)

_E4M3_MAX = tl.constexpr(float(contract.E4M3_MAX))
_E4M3_MAX_EXPONENT = tl.constexpr(contract.E4M3_MAX_EXPONENT)
_FP8_AMAX_MIN = tl.constexpr(float.fromhex(contract.FP8_AMAX_MIN))
_INT4_DIVISOR = tl.constexpr(float(contract.INT4_DIVISOR))
_INT4_SCALE_MIN = tl.constexpr(float.fromhex(contract.INT4_SCALE_MIN))
_ROUND = tl.constexpr(1.5 * 2.0**23)
LINE = tl.constexpr(6)  # int64 to a line of the table


@triton.jit
def _scale(amax, QUANTIZER: tl.constexpr):
    """(scale as fp32, what e4m3 codes are multiplied by, E8M0 byte) of blocks by the bits of their largest |x|.

    From 0x7f80 on a block holds Inf or NaN: all three are NaN.
    """
    poisoned = amax >= 0x7F80
    a = (amax << 16).to(tl.float32, bitcast=True)
    one = tl.full(a.shape, 1.0, tl.float32)
    nan = e8m0_to_f32(amax * 0 + 255)  # by its bits: a GPU's own NaN has others
    if QUANTIZER == INT4:
        s = tl.div_rn(a, one * _INT4_DIVISOR)
        s = to_f32(to_bf16(tl.where(s > _INT4_SCALE_MIN, s, _INT4_SCALE_MIN)))
        return tl.where(poisoned, nan, s), nan, amax
    if QUANTIZER == FP8:
        s = tl.div_rn(tl.where(a > _FP8_AMAX_MIN, a, _FP8_AMAX_MIN), one * _E4M3_MAX)
        return tl.where(poisoned, nan, s), tl.where(poisoned, nan, tl.div_rn(one, s)), amax
    if QUANTIZER == FP8_POWER_OF_TWO:
        e = ceil_exponent(tl.div_rn(tl.where(a > _FP8_AMAX_MIN, a, _FP8_AMAX_MIN), one * _E4M3_MAX))
    elif QUANTIZER == MX_RCEIL:
        e = ceil_exponent(tl.div_rn(a, one * _E4M3_MAX))
    else:
        e = tl.maximum((amax >> 7) - _E4M3_MAX_EXPONENT, 0)
    inverse = tl.where(poisoned, nan, e8m0_to_f32(254 - e))
    e = tl.where(poisoned, 255, e)
    return e8m0_to_f32(e), inverse, e


@triton.jit
def _place(program, rows, k, SQUARE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's [GROUPS, WIDTH] elements: (row, block of k, index of the scale, whether it exists) per group.

    A group is a row of the one square block, or a 1 x WIDTH block: those are numbered along the rows.
    """
    blocks = tl.cdiv(k, WIDTH)
    group = tl.arange(0, GROUPS)
    if SQUARE:
        row = (program // blocks).to(tl.int64) * GROUPS + group
        block = program % blocks + group * 0
        return row, block, program + group * 0, row < rows
    else:
        at = program.to(tl.int64) * GROUPS + group
        row = at // blocks
        return row, (at - row * blocks).to(tl.int32), at, row < rows


@triton.jit
def _quantize(
    program,
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    k,
    QUANTIZER: tl.constexpr,
    SQUARE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes and scales of one program's blocks."""
    row, block, scale_at, exists = _place(program, rows, k, SQUARE, GROUPS, WIDTH)
    column = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = row[:, None] * k + column
    mask = exists[:, None] & (column < k)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    # as integers NaN is above Inf is above every number
    amax = tl.max(x.to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF, axis=1)
    if SQUARE:
        amax = tl.max(amax, axis=0) + tl.zeros((GROUPS,), tl.int32)
        exists = exists & (tl.arange(0, GROUPS) == 0)
    scale, inverse, e8m0 = _scale(amax, QUANTIZER)
    if QUANTIZER == INT4:
        tl.store(scale_ptr + scale_at, to_bf16(scale), mask=exists)
        q = tl.div_rn(to_f32(x), tl.broadcast_to(scale[:, None], (GROUPS, WIDTH)))
        q = (q + _ROUND) - _ROUND  # nearest even
        q = tl.where(q < -8.0, -8.0, tl.where(q > 7.0, 7.0, q))
        words = int4_pack(tl.where(q == q, q, 0.0).to(tl.int32), GROUPS, WIDTH)
        word = block[:, None] * (WIDTH // 8) + tl.arange(0, WIDTH // 8)[None, :]
        tl.store(code_ptr + row[:, None] * (k // 8) + word, words, mask=(row < rows)[:, None])
    else:
        tl.store(scale_ptr + scale_at, e8m0.to(tl.uint8) if QUANTIZER >= MX_RCEIL else scale, mask=exists)
        tl.store(code_ptr + at, to_e4m3(to_f32(x) * inverse[:, None]), mask=mask)


@triton.jit
def _dequantize(
    program,
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    k,
    QUANTIZER: tl.constexpr,
    SQUARE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x = code scale of one program's blocks, rounded to fp32, then to bf16."""
    row, block, scale_at, exists = _place(program, rows, k, SQUARE, GROUPS, WIDTH)
    column = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = row[:, None] * k + column
    mask = exists[:, None] & (column < k)
    scale = tl.load(scale_ptr + scale_at, mask=exists, other=0)
    if QUANTIZER == INT4:
        word = block[:, None] * (WIDTH // 8) + tl.arange(0, WIDTH // 8)[None, :]
        words = tl.load(code_ptr + row[:, None] * (k // 8) + word, mask=exists[:, None], other=0)
        code = int4_to_f32(words, GROUPS, WIDTH)
    else:
        code = e4m3_to_f32(tl.load(code_ptr + at, mask=mask, other=0))
    tl.store(x_ptr + at, to_bf16(code * scale_to_f32(scale)[:, None]), mask=mask)


@triton.jit
def _run(
    program,
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    k,
    BACK: tl.constexpr,
    QUANTIZER: tl.constexpr,
    SQUARE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program's share of a tensor [rows, k]; BACK: from codes to values."""
    if BACK:
        _dequantize(program, x_ptr, code_ptr, scale_ptr, rows, k, QUANTIZER, SQUARE, GROUPS, WIDTH)
    else:
        _quantize(program, x_ptr, code_ptr, scale_ptr, rows, k, QUANTIZER, SQUARE, GROUPS, WIDTH)


@triton.jit
def quantize_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    k,
    BACK: tl.constexpr,
    QUANTIZER: tl.constexpr,
    SQUARE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A lone tensor."""
    _run(tl.program_id(0), x_ptr, code_ptr, scale_ptr, rows, k, BACK, QUANTIZER, SQUARE, GROUPS, WIDTH)


@triton.jit
def _pointer(at, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer, of which the compiler learns that it is aligned."""
    pointer = tl.load(at).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def quantize_table_kernel(
    table_ptr,
    count,
    steps,
    BACK: tl.constexpr,
    QUANTIZER: tl.constexpr,
    SQUARE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``count`` tensors, a line of the table each: first program, x, codes, scales, rows, k. All have programs.

    A program's line is the last whose first program is not above its own, found by ``steps`` halvings.
    ALIGNED: all addresses and all k are multiples of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    low = program * 0
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        here = tl.load(table_ptr + middle * LINE) <= program
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    line = table_ptr + low * LINE
    code_type: tl.constexpr = tl.int32 if QUANTIZER == INT4 else tl.uint8
    scale_of_codes: tl.constexpr = tl.uint8 if QUANTIZER >= MX_RCEIL else tl.float32
    scale_type: tl.constexpr = tl.bfloat16 if QUANTIZER == INT4 else scale_of_codes
    x_ptr = _pointer(line + 1, tl.bfloat16, ALIGNED)
    code_ptr = _pointer(line + 2, code_type, ALIGNED)
    scale_ptr = _pointer(line + 3, scale_type, ALIGNED)
    rows = tl.load(line + 4)
    k = tl.load(line + 5)
    if ALIGNED:
        k = tl.multiple_of(k, 16)
    _run(program - tl.load(line), x_ptr, code_ptr, scale_ptr, rows, k, BACK, QUANTIZER, SQUARE, GROUPS, WIDTH)


class _Matrix(NamedTuple):
    """One tensor of a launch."""

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    rows: int
    k: int
    programs: int


def _matrix(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, quantizer: int, rows: int, columns: int, groups: int
) -> _Matrix:
    """The tensors with their types back: the operators take codes and scales as bytes."""
    if quantizer == INT4.value:
        codes, scales = codes.view(torch.int32), scales.view(torch.bfloat16)
    elif quantizer in (FP8.value, FP8_POWER_OF_TWO.value):
        scales = scales.view(torch.float32)
    k = x.shape[-1]
    height = x.numel() // k if k else 0
    blocks = triton.cdiv(k, columns)
    programs = triton.cdiv(height, rows) * blocks if rows > 1 else triton.cdiv(height * blocks, groups)
    return _Matrix(x, codes, scales, height, k, programs)


def _table(matrices: list[_Matrix]) -> tuple[torch.Tensor, bool]:
    """The lines of quantize_table_kernel on the device, and whether everything is aligned."""
    firsts = [0, *accumulate(m.programs for m in matrices)]
    lines = [
        (first, m.x.data_ptr(), m.codes.data_ptr(), m.scales.data_ptr(), m.rows, m.k)
        for first, m in zip(firsts, matrices, strict=False)
    ]
    aligned = all(n % 16 == 0 for _, *addresses, _, k in lines for n in (*addresses, k))
    table, device = torch.tensor(lines, dtype=torch.int64), matrices[0].x.device
    return (table if device.type == "cpu" else table.pin_memory()).to(device, non_blocking=True), aligned


def _launch(
    x: list[torch.Tensor],
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    quantizer: int,
    rows: int,
    columns: int,
    back: bool,
) -> None:
    config = quantize_config(rows, columns)
    matrices = [
        _matrix(*tensors, quantizer, rows, columns, config.groups) for tensors in zip(x, codes, scales, strict=True)
    ]
    matrices = [m for m in matrices if m.programs]
    if not matrices:
        return
    grid = (sum(m.programs for m in matrices),)
    constants = {"BACK": back, "QUANTIZER": quantizer, "SQUARE": rows > 1, "GROUPS": config.groups, "WIDTH": columns}
    options = launch_options(config.num_warps)
    if len(matrices) == 1:
        quantize_kernel[grid](*matrices[0][:5], **constants, **options)
        return
    table, aligned = _table(matrices)
    steps = (len(matrices) - 1).bit_length()
    quantize_table_kernel[grid](table, len(matrices), steps, **constants, ALIGNED=aligned, **options)


def quantize(
    x: list[torch.Tensor],
    quantizer: int,
    rows: int,
    columns: int,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
) -> None:
    """``zerokl::quantize``: x bf16 [..., K] each; codes and scales as bytes; blocks of rows x columns."""
    _launch(x, codes, scales, quantizer, rows, columns, back=False)


def dequantize(
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    quantizer: int,
    rows: int,
    columns: int,
    x: list[torch.Tensor],
) -> None:
    """``zerokl::dequantize``: the values of codes into x bf16 [..., K] each."""
    _launch(x, codes, scales, quantizer, rows, columns, back=True)
