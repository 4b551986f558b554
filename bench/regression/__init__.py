"""The cases of the GPU regression, a file per family of ops."""

from __future__ import annotations

from zerokl.bench.regression.attention import attention_cases
from zerokl.bench.regression.case import Case
from zerokl.bench.regression.dense import dense_cases
from zerokl.bench.regression.moe import moe_cases
from zerokl.bench.regression.quantise import quantised_linear_cases, quantiser_cases
from zerokl.bench.regression.tensor_core import tensor_core_cases

_FAMILIES = (dense_cases, attention_cases, moe_cases, quantiser_cases, quantised_linear_cases, tensor_core_cases)


def cases(small: bool) -> list[Case]:
    """Every case; ``small`` sizes for a rehearsal on a CPU."""
    return [case for family in _FAMILIES for case in family(small)]
