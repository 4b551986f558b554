"""Every public op has a row in a speed suite, and every row runs: small shapes, nothing is timed."""

import pytest
import torch

from zerokl import kernels
from zerokl.bench import collective_speed
from zerokl.bench.kernels import cases

CPU = torch.device("cpu")
NOT_TIMED = {
    "accelerate", "accelerators", "matrix_step", "rotary_table", "vocabulary_share",
    "fake_quantize_fp8_block", "fake_quantize_mxfp8",  # quantise and dequantise, which have rows
    "from_blackwell_scales", "from_hopper_scales", "to_blackwell_scales", "to_hopper_scales",  # copies of few bytes
}  # fmt: skip
SMALL = [
    *(cases.linear(CPU, m, 8, 16) for m in (1, 4, 256)),
    *cases.row_ops(CPU, 3, 16, 24, 2, 8),
    *cases.attentions(CPU, 4, 2, 8, 5, (2, 64)),
    *cases.scores(CPU, 16, 40, (2, 5)),
    *cases.experts(CPU, 3, 16, 8, count=4, k=2),
    *cases.quantisers(CPU, 3, 256),
    *cases.quantised_linears(CPU, 3, 8, 64),
]


def test_every_op_has_a_row():
    ops = {name for name in kernels.__all__ if not isinstance(getattr(kernels, name), type)}
    timed = {case.op.split()[0] for case in SMALL} | set(collective_speed.OPS)
    assert ops - timed == NOT_TIMED
    assert timed - ops == {"attention"}  # with its backward


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op} {case.shape}")
def test_both_sides_run(case):
    case.ours()
    case.torch()
    assert case.bytes > 0 or case.flops > 0


def test_the_weights_of_few_rows_are_cold(monkeypatch):
    monkeypatch.setattr(cases, "CACHE_BYTES", 10 * 2 * 8 * 16)
    seen = []
    monkeypatch.setattr(kernels, "linear", lambda _, w: seen.append(w.data_ptr()))
    case = cases.linear(CPU, 4, 8, 16)
    for _ in range(20):
        case.ours()
    assert len(set(seen)) == 10
    assert seen[:10] == seen[10:]
