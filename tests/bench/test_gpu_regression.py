"""The GPU regression, rehearsed on the CPU; its digests pin every op's bits on fixed data."""

import json

import pytest
import torch

from zerokl.bench.gpu_regression import DIGESTS, check, measure, table
from zerokl.bench.regression import cases

CPU = torch.device("cpu")
CASES = {case.name: case for case in cases(small=True)}


@pytest.mark.parametrize("name", CASES)
def test_checks_pass_and_bits_are_the_kept_ones(name):
    problems, digest = check(CASES[name], CPU, repeats=2)
    assert problems == []
    kept = json.loads(DIGESTS.read_text())
    assert kept.keys() == CASES.keys()
    assert digest == kept[name], "bits changed: a new contract version? `gpu_regression --rehearse --write-digests`"


def test_a_wrong_bit_is_found():
    case = CASES["silu_and_mul"]
    calls = []

    def wrong_once(*inputs):
        calls.append(1)
        (y,) = case.run(*inputs)
        if len(calls) == 1:
            y.view(torch.int16).flatten()[5] ^= 1
        return (y,)

    broken = type(case)(**{**vars(case), "run": wrong_once})
    problems, _ = check(broken, CPU, repeats=1)
    assert any("output 0 differs from the CPU's in 1 of" in p for p in problems)


def test_the_table_names_every_case():
    case = CASES["rms_norm"]
    text = table({"about": {}, "checks": {"rms_norm": ["bad"]}, "times": {"rms_norm": measure(case, CPU, 1)}})
    assert "rms_norm" in text
    assert "bad" in text
