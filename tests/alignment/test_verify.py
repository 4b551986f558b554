"""The comparison finds one flipped bit, never forgives a NaN and never passes on nothing."""

import math

import numpy as np
import pytest

from zerokl.alignment.mismatch import kl_estimates
from zerokl.alignment.types import Generation
from zerokl.alignment.verify import compare, mismatches


def generation(values, first_token=10):
    logprobs = np.array(values, np.float32)
    return Generation(tuple(range(first_token, first_token + len(values))), logprobs, logprobs, "stop", "0")


def test_equal_bits_give_exactly_zero():
    values = [-0.5, -1.25, -3.0]
    result = compare([generation(values)], [np.array(values, np.float32)])
    assert result.equal
    assert (result.tokens, result.mismatched_tokens, result.nonfinite, result.max_abs_diff) == (3, 0, 0, 0.0)
    assert (result.kl.k1, result.kl.k2, result.kl.k3) == (0.0, 0.0, 0.0)
    assert math.copysign(1, result.kl.k1) == 1
    assert result.first_mismatch is None


def test_one_ulp_is_found_and_located():
    other = [np.array([-1.0, -2.0], np.float32), np.array([-3.0, -4.0], np.float32)]
    other[1][0] = np.nextafter(other[1][0], np.float32(0))
    result = compare([generation([-1.0, -2.0]), generation([-3.0, -4.0], 50)], other)
    assert not result.equal
    assert result.mismatched_tokens == 1
    assert result.max_abs_diff > 0
    assert (result.first_mismatch.request, result.first_mismatch.position, result.first_mismatch.token) == (1, 0, 50)
    assert result.first_mismatch.rollout == "0xc0400000 (-3.0)"
    assert result.first_mismatch.trainer.startswith("0xc03fffff")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_equal_nonfinite_values_are_mismatches(value):
    values = [-1.0, value]
    result = compare([generation(values)], [np.array(values, np.float32)])
    assert not result.equal
    assert (result.mismatched_tokens, result.nonfinite) == (1, 1)
    assert math.isnan(result.max_abs_diff)
    assert math.isnan(result.kl.k3)


def test_signed_zeros_differ_as_bits():
    assert mismatches(np.array([0.0], np.float32), np.array([-0.0], np.float32)).tolist() == [True]


def test_nothing_compared_is_not_equal():
    assert not compare([], []).equal
    assert not compare([generation([])], [np.empty(0, np.float32)]).equal


def test_missing_values_are_refused():
    with pytest.raises(ValueError, match="request 0"):
        compare([generation([-1.0, -2.0])], [np.array([-1.0], np.float32)])
    with pytest.raises(ValueError, match="float32"):
        mismatches(np.zeros(1), np.zeros(1))


def test_kl_estimates_by_hand():
    kl = kl_estimates(np.array([-1.0, -2.0], np.float32), np.array([-1.5, -1.0], np.float32))  # d = -0.5, +1
    assert kl.k1 == pytest.approx(-0.25)
    assert kl.k2 == pytest.approx((0.125 + 0.5) / 2)
    assert kl.k3 == pytest.approx(((math.exp(-0.5) - 1 + 0.5) + (math.e - 1 - 1)) / 2)
