"""Many rows: every row op equals the reference in every byte whatever the number of rows, drawn by hypothesis."""

import numpy as np
import pytest
import torch
from data import assert_same_bits, f32, hashed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerokl import kernels
from zerokl.kernels.reference import activation, linear, logprob, moe, norm, quantize, rotary

ROWS = st.sampled_from([1, 3, 17, 63, 65, 129, 257, 2049])
drawn = settings(
    max_examples=32, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
W, HEAD, NORM = hashed(19, 37, seed=20), hashed(70, 37, seed=21), hashed(37, seed=22)


def check_linear(x):
    assert_same_bits(kernels.linear(x, W), linear.linear(f32(x), f32(W)), "y")


def check_rms_norm(x):
    y, total = kernels.rms_norm(x, NORM, 1e-6, residual=x)
    expected = norm.rms_norm(f32(x), f32(NORM), 1e-6, f32(x))
    assert_same_bits(y, expected[0], "y")
    assert_same_bits(total, expected[1], "sum")


def check_silu_and_mul(x):
    x = torch.cat([x, -x], -1)
    assert_same_bits(kernels.silu_and_mul(x), activation.silu_and_mul(f32(x)), "y")


def check_rotary(x):
    x, positions, table = x[:, None, :32], torch.arange(len(x)) * 7 % 90, kernels.rotary_table(90, 32, 1e4)
    assert_same_bits(
        kernels.rotary(x, x, positions, table)[0],
        rotary.rotary(f32(x), positions.numpy(), table.numpy()),
        "rotary",
    )


def check_embedding(x):
    ids = torch.arange(len(x)) * 5 % 19
    assert_same_bits(kernels.embedding(ids, W), linear.embedding(ids.numpy(), f32(W)), "y")


def check_selected_logprob(x):
    targets = torch.arange(len(x)) * 11 % 70
    got = kernels.selected_logprob(x, HEAD, targets, temperature=0.8).logprob
    rows = {0, len(x) // 2, len(x) - 1}  # the reference scores a row at a time
    logits = linear.linear(f32(x), f32(HEAD), round_output=False)
    for r in rows:
        assert_same_bits(got[r], logprob.logprob_row(logits[r], int(targets[r]), temperature=0.8)[0], f"row {r}")


def check_router(x):
    logits = x[:, :16].float().contiguous()
    got = kernels.router_topk(logits, 3, scoring="softmax")
    for r in {0, len(x) // 3, len(x) - 1}:
        weights, indices = moe.router_row(f32(logits[r]), 3, scoring="softmax")
        assert got.indices[r].tolist() == indices.tolist()
        assert_same_bits(got.weights[r], weights, f"row {r}")


def check_combine(x):
    indices = (torch.arange(len(x))[:, None] + torch.tensor([0, 3])) % 5
    rows, permutation = kernels.moe_permute(x, indices, 5)
    weights = hashed(len(x), 2, seed=23).float() * (1 + 2.0**-12)
    position = permutation.position.numpy()
    assert_same_bits(
        kernels.moe_combine(rows, permutation, weights), moe.combine(f32(rows), position, f32(weights)), "combined"
    )


def check_fp8_block(x):
    got = kernels.quantize_fp8_block(x, block=(1, 128))
    codes, scales = quantize.quantize_fp8_block(f32(x), (1, 128))
    assert np.array_equal(got.codes.view(torch.uint8).numpy(), codes)
    assert_same_bits(got.scales, scales, "scales")


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
@drawn
@given(rows=ROWS, kind=st.sampled_from(["plain", "wide", "cancel", "tiny"]))
def test_equals_reference(isa, name, rows, kind):
    CHECKS[name](hashed(rows, 37, seed=24, kind=kind))
