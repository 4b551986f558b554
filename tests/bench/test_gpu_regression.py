"""The GPU regression, rehearsed on the CPU; its digests pin every op's bits on fixed data."""

import json

import pytest
import torch

from zerokl.bench.gpu_regression import DIGESTS, check, measure, table, under_load
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


def test_backward_passes_under_load_agree():
    assert under_load(CPU, repeats=2) == []


def test_a_backward_pass_that_wavers_is_found(monkeypatch):
    calls = []

    def wavering(output, inputs, *arguments, **options):
        calls.append(1)
        grads = real(output, inputs, *arguments, **options)
        if len(calls) == 3:
            next(g for g in grads if g is not None).view(torch.int16).flatten()[0] ^= 1
        return grads

    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", wavering)
    assert any("backward pass 3 differs" in problem for problem in under_load(CPU, repeats=2))
