"""Triton's interpreter, for every file of interpreter cases.

The interpreter's fma rounds once, and its division and square root are IEEE: cross-device kernels equal the reference
in every byte. Its ``tl.dot`` multiplies the raw words of bf16 operands, so here a matrix step is the R1 chain of the
CPU profile instead. What the matrix unit itself computes is not tested; that products chain over ascending k, continue
accumulators and add segments as R2 says is, byte by byte.
"""

import numpy as np
import pytest

from zerokl.kernels.reference import arith
from zerokl.kernels.reference.quantize import e4m3_value

triton = pytest.importorskip("triton")
tl = triton.language

from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def _wide(t):
    if t.dtype.scalar == tl.float8e4nv:
        return e4m3_value(t.data.view(np.uint8))
    return (t.data.astype(np.uint32) << 16).view(np.float32) if t.data.dtype == np.uint16 else t.data


def _dot(self, a, b, d, *_):
    """A matrix step as the R1 chain of the CPU profile."""
    return TensorHandle(arith.chain(_wide(a), _wide(b), d.data), d.dtype.scalar)


def chain_matrix_steps():
    """From here on ``tl.dot`` chains as R1 says."""
    interpreter.InterpreterBuilder.create_dot = _dot
