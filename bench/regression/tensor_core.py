"""The tensor core against its model: single matrix instructions, and a linear layer predicted step by step (R1)."""

from __future__ import annotations

from functools import partial

import torch

from zerokl import kernels
from zerokl.bench.regression.case import Case, Tensors, hashed
from zerokl.kernels.contract import MATRIX_STEPS, MatrixStep

_ELEMENT = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_PREDICTED = (64, 64, 512)  # rows, outputs, depth


def tensor_core_cases(small: bool) -> list[Case]:
    """A million dot products of each instruction (a thousandth if ``small``), and one linear layer."""
    dots = 1024 if small else 1 << 20
    made = [
        Case(
            step.instruction, partial(_tiles, step, max(1, dots // (step.rows * step.columns))),
            partial(_step, step.instruction), cross_device=True, cuda_part=True,
        )
        for step in MATRIX_STEPS
    ]  # fmt: skip
    made.append(Case("linear predicted", _linear_inputs, lambda x, w: (_predict(x, w),), cross_device=True))
    return made


def _step(instruction: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Tensors:
    return (kernels.matrix_step(a, b, c, instruction=instruction),)


def _spread(*shape: int, seed: int, exponents: int) -> torch.Tensor:
    """fp32 with exponents over a range, an eighth of them zero."""
    powers = torch.exp2((hashed(*shape, seed=seed + 1).float() * exponents).round())
    kept = hashed(*shape, seed=seed + 2).float() > -0.75
    return hashed(*shape, seed=seed).float() * powers * kept


def _tiles(step: MatrixStep, tiles: int) -> Tensors:
    """Tiles whose terms are near, far apart, and cancel by halves."""
    range_of = 6 if step.element == "e4m3" else 14
    a = _spread(tiles, step.rows, step.depth, seed=20, exponents=range_of)
    b = _spread(tiles, step.columns, step.depth, seed=30, exponents=range_of)
    half = step.depth // 2
    a[::2, :, half:], b[::2, :, half:] = -a[::2, :, :half], b[::2, :, :half]
    c = _spread(tiles, step.rows, step.columns, seed=40, exponents=20)
    element = _ELEMENT[step.element]
    return a.to(element), b.to(element), c


def _linear_inputs() -> Tensors:
    rows, outputs, depth = _PREDICTED
    return hashed(rows, depth, seed=50), hashed(outputs, depth, seed=51)


def _predict(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """On a GPU the linear layer; on a CPU what the model of the tensor core says it gives."""
    if x.is_cuda:
        return kernels.linear(x, w)
    step = MATRIX_STEPS[0]
    down, across = x.shape[0] // step.rows, w.shape[0] // step.columns
    sums = torch.zeros(down * across, step.rows, step.columns)
    for k in range(0, x.shape[1], step.depth):
        a = x[:, k : k + step.depth].reshape(down, 1, step.rows, step.depth).expand(-1, across, -1, -1)
        b = w[:, k : k + step.depth].reshape(1, across, step.columns, step.depth).expand(down, -1, -1, -1)
        sums = kernels.matrix_step(a.flatten(0, 1), b.flatten(0, 1), sums, instruction=step.instruction)
    tiles = sums.reshape(down, across, step.rows, step.columns)
    return tiles.transpose(1, 2).reshape(x.shape[0], w.shape[0]).bfloat16()
