"""Which of other libraries' kernels are used: only those that are byte-equal. Judged here on CPU stand-ins."""

import pytest
import torch

pytest.importorskip("triton")

import zerokl.kernels.triton as backend
from zerokl import kernels
from zerokl.kernels.ops import accelerators as start_up
from zerokl.kernels.ops._common import ops
from zerokl.kernels.triton import accelerators
from zerokl.kernels.triton.accelerators import CANDIDATES, Accelerator, accelerate, dispatch, judge
from zerokl.orchestrate import manifest

CPU = torch.device("cpu")
NAN = float("nan")
LINEAR = next(c for c in CANDIDATES if c.op == "linear")


def small_cases(device):
    for m in (1, 7, 65):
        yield accelerators._linear_case(m, 64, 128, device)


def candidate(run, package="torch", takes=LINEAR.takes):
    return Accelerator("stand-in", "linear", package, takes, run, small_cases, (4,))


def equal(x, w, bias, segments, y):
    ops.linear(x, w, bias, segments, y)


def one_bit_off(x, w, bias, segments, y):
    ops.linear(x, w, bias, segments, y)
    if len(x) == 65:
        y.view(torch.int16)[64, 63] ^= 1


def another_order(x, w, _bias, _segments, y):
    y.copy_(x.flip(1) @ w.flip(1).T)


def raises(*_):
    raise RuntimeError("needs a better GPU")


@pytest.mark.parametrize(
    ("stand_in", "on", "reason"),
    [
        (candidate(equal), True, "byte-equal on 3 cases"),
        (candidate(one_bit_off), False, r"1 of 4160 values differ for shapes [(65, 128), (64, 128), (65, 64)]"),
        (candidate(another_order), False, "values differ"),
        (candidate(lambda *_: None), False, "64 of 64 values differ"),
        (candidate(raises), False, "RuntimeError: needs a better GPU"),
        (candidate(equal, package="no_such_package"), False, "package no_such_package is not installed"),
        (candidate(equal, takes=lambda *_: False), False, "no case was compared"),
    ],
)
def test_verdicts(stand_in, on, reason):
    verdict = judge(stand_in, ops.linear, CPU)
    assert verdict.on == on
    assert reason in verdict.reason


@pytest.mark.parametrize(("second", "reason"), [
    ([0.0, 1.0, NAN], "byte-equal on 1 cases"),
    ([0.0, 2.0, NAN], "1 of 3 values differ for shapes [(3,), (3,), (3,)]"),
    ([-0.0, 1.0, NAN], "1 of 3"),
    ([0.0, NAN, NAN], "1 of 3"),
    ([0.0, 1.0, 1.0], "1 of 3"),
])  # fmt: skip
def test_every_output_is_compared_as_bits(second, reason):
    """The second output decides alone; NaN equals NaN and nothing else."""

    def both(x, y, z):
        y.copy_(x)
        z.copy_(x)

    def other(x, y, z):
        y.copy_(x)
        z.copy_(torch.tensor(second))

    def cases(_):
        yield torch.tensor([0.0, 1.0, NAN]), torch.empty(3), torch.empty(3)

    assert (
        reason in judge(Accelerator("stand-in", "op", "torch", lambda *_: True, other, cases, (1, 2)), both, CPU).reason
    )


def test_only_what_is_byte_equal_is_dispatched():
    used = []

    def seen(*arguments):
        used.append(arguments[0].shape[0])
        equal(*arguments)

    def seen_one_bit_off(*arguments):
        used.append(arguments[0].shape[0])
        one_bit_off(*arguments)

    call = dispatch("linear", ops.linear)
    x, w, bias, segments, y = next(iter(small_cases(CPU)))
    try:
        assert [v.on for v in accelerate({"linear": ops.linear}, CPU, [candidate(seen)])] == [True]
        used.clear()
        call(x, w, bias, segments, y)
        assert used == [1]
        call(x, w, torch.zeros(64), segments, y)  # not taken: a bias
        assert used == [1]
        assert [v.on for v in accelerate({"linear": ops.linear}, CPU, [candidate(seen_one_bit_off)])] == [False]
        used.clear()
        call(x, w, bias, segments, y)
        assert used == []
    finally:
        accelerate({}, CPU, [])


@pytest.mark.parametrize("chosen", CANDIDATES, ids=lambda c: c.name)
def test_the_choice_never_sees_the_number_of_rows(chosen):
    """R0: what is taken for one number of rows is taken for every other; and the cases are of the operator's form."""
    taken = [chosen.takes(*arguments) for arguments in chosen.cases(torch.device("meta"))]
    assert taken
    assert all(taken)


def test_without_a_gpu_nothing_is_judged():
    assert kernels.accelerate() == ()
    assert kernels.accelerators() == []


def test_the_manifest_tells_what_stays_off_and_why(monkeypatch):
    """The start-up judgement as on a machine with a GPU, whose current device is said to be the CPU."""
    monkeypatch.setattr(start_up, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(start_up, "_verdicts", [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *_: CPU)
    monkeypatch.setattr(backend, "check_capability", lambda _: None)
    monkeypatch.setattr(backend, "KERNELS", {"linear": ops.linear})
    monkeypatch.setattr(accelerators, "CANDIDATES", (candidate(equal), candidate(one_bit_off)))
    try:
        assert [verdict.on for verdict in kernels.accelerate()] == [True, False]
    finally:
        accelerate({}, CPU, [])
    used, unused = manifest.build({}, {}, manifest.Observed())["accelerators"]
    assert used == {"name": "stand-in", "op": "linear", "on": True, "reason": "byte-equal on 3 cases"}
    assert unused["on"] is False
    assert unused["reason"].startswith("1 of 4160 values differ")
