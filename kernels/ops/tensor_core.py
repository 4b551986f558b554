"""One step of a tensor core (R1): the instruction itself on a GPU, the model of its arithmetic on a CPU."""

from __future__ import annotations

import torch

from ..contract import MATRIX_STEPS
from ._common import check, check_device, ops

_ELEMENT = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_NUMBER = {step.instruction: number for number, step in enumerate(MATRIX_STEPS)}


def has_cuda_part() -> bool:
    """Whether the extension was built with its CUDA sources (nvcc and a torch with CUDA were there)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("zerokl::matrix_step", "CUDA")


def matrix_step(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, instruction: str) -> torch.Tensor:
    """``c + a @ b.T`` by one matrix instruction per tile: fp32 [tiles, rows, columns].

    a [tiles, rows, depth], b [tiles, columns, depth] in bf16 or float8_e4m3fn, c fp32 [tiles, rows, columns].
    ``instruction`` and the sizes it wants: ``contract.MATRIX_STEPS``. On CUDA the chip runs it; on the CPU the model of
    PyPI ``mmasim`` for Hopper and Blackwell does, so that a CPU can predict the profile ``sm90-bf16`` and a GPU can
    check the prediction. Raises ValueError for other sizes and dtypes, RuntimeError for a GPU without the instruction
    or a build without CUDA.
    """
    name = "matrix_step"
    check(instruction in _NUMBER, name, f"instruction {instruction!r} is unknown; supported: {', '.join(_NUMBER)}")
    number = _NUMBER[instruction]
    step = MATRIX_STEPS[number]
    element = _ELEMENT[step.element]
    check(
        a.dtype == element and b.dtype == element and c.dtype == torch.float32,
        name,
        f"{instruction} takes a and b in {element}, c in torch.float32; got {a.dtype}, {b.dtype}, {c.dtype}",
    )
    tiles = a.shape[:1]
    wanted = [(*tiles, step.rows, step.depth), (*tiles, step.columns, step.depth), (*tiles, step.rows, step.columns)]
    got = [tuple(t.shape) for t in (a, b, c)]
    check(got == wanted, name, f"{instruction} takes a, b, c of shapes {wanted}; got {got}")
    check_device(name, a=a, b=b, c=c)
    if a.is_cuda and not has_cuda_part():
        raise RuntimeError(
            f"zerokl.kernels.{name}: this build has no CUDA part; rebuild where nvcc and a torch with CUDA are present"
        )
    a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
    if step.element == "e4m3":
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    d = torch.empty_like(c)
    ops.matrix_step(a, b, c, number, step.fraction, step.result, d)
    return d
