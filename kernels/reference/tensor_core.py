"""The model of one tensor-core step (R1) in exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..contract import MATRIX_STEP_ZERO, MatrixStep
from .arith import F32, Array

SMALLEST_EXPONENT = {"bf16": -126, "e4m3": -6, "fp32": -126}
NAN = np.array([0x7FFFFFFF], dtype=np.uint32).view(F32)[0]


def _exponent(value: Fraction, smallest: int) -> int:
    """floor(log2 |value|), not below the format's smallest exponent."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    return max(exponent, smallest)


def _truncate(value: Fraction, unit: Fraction) -> Fraction:
    """Toward zero, to a multiple of unit."""
    return int(value / unit) * unit


def matrix_step(a: Array, b: Array, c: Array, step: MatrixStep) -> Array:
    """c + a @ b.T for a [rows, depth], b [columns, depth] (values of the element type as fp32), c fp32."""
    out = np.empty(c.shape, dtype=F32)
    for at in np.ndindex(*c.shape):
        out[at] = _dot(a[at[0]], b[at[1]], c[at], step)
    return out


def _dot(a: Array, b: Array, c: Array | F32, step: MatrixStep) -> Array | F32:
    with np.errstate(invalid="ignore"):
        special = (a.astype(np.float64) * b).sum() + np.float64(c)
    if not np.isfinite(special):
        return NAN if np.isnan(special) else F32(special)
    smallest = SMALLEST_EXPONENT[step.element]
    terms = [(Fraction(float(c)), _exponent(Fraction(float(c)), SMALLEST_EXPONENT["fp32"]) if c else MATRIX_STEP_ZERO)]
    for x, y in zip(map(float, a), map(float, b), strict=True):
        # the exponents add; the product, up to 4, is not normalised
        exponent = _exponent(Fraction(x), smallest) + _exponent(Fraction(y), smallest) if x * y else MATRIX_STEP_ZERO
        terms.append((Fraction(x) * Fraction(y), exponent))
    unit = Fraction(2) ** (max(exponent for _, exponent in terms) - step.fraction)
    total = sum((_truncate(value, unit) for value, _ in terms), Fraction(0))
    if not total:
        return F32(0)
    rounded = _truncate(total, Fraction(2) ** (_exponent(total, SMALLEST_EXPONENT["fp32"]) - step.result))
    if abs(rounded) >= Fraction(2) ** 128:
        return F32(np.inf if rounded > 0 else -np.inf)
    return F32(float(rounded))
