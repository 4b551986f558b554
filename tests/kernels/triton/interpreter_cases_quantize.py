"""The quantisers and the linear layers on codes in Triton's interpreter, against the CPU's operators, byte for byte.

Run by ``test_interpreter.py``. As in ``interpreter_cases.py`` a matrix step is the R1 chain of the CPU profile, over
e4m3 codes too: blocks, promotion, scales, bias and rounding are the kernels' own and must give the CPU's bytes.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from data import assert_same_bits, hashed
from interpreted import chain_matrix_steps
from memory import watch
from test_quantize import CASES, E4M3, INF, LINEARS, NAN, SQUARE, edge_blocks, fits

from zerokl import kernels
from zerokl.kernels.ops._common import ops
from zerokl.kernels.reference import quantize as ref
from zerokl.kernels.triton import KERNELS, _codes, linear, quantize, quantized_linear

triton = pytest.importorskip("triton")
tl = triton.language

chain_matrix_steps()
by_address = watch()

OPS = ("quantize", "dequantize", "scaled_linear", "int4_linear", "linear_dx", "linear_dw", "bias_grad")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_linear = pytest.mark.parametrize(("x_case", "w_case", "run", "options"), LINEARS.values(), ids=LINEARS)


@contextmanager
def on_triton():
    """The public ops run these kernels, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPS:
            patch.setattr(ops, name, KERNELS[name])
        yield


def assert_same_bytes(actual, expected, what):
    assert actual.dtype == expected.dtype, what
    a, b = (t.contiguous().view(torch.uint8) for t in (actual, expected))
    assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} bytes differ"


def check_quantiser(case, x):
    expected = case.quantize(x)
    value = case.dequantize(expected)
    with on_triton():
        got = case.quantize(x)
        assert_same_bytes(got.codes, expected.codes, "codes")
        assert_same_bytes(got.scales, expected.scales, "scales")
        assert_same_bytes(case.dequantize(got), value, "value")


@triton.jit
def _apply(x_ptr, y_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0)
    if NAME == "to_e4m3":
        y = _codes.to_e4m3(x)
    elif NAME == "e4m3_to_f32":
        y = _codes.e4m3_to_f32(x)
    else:
        y = _codes.e8m0_to_f32(x)
    tl.store(y_ptr + at, y, mask=at < n)


def apply(name, x, dtype):
    y = torch.empty(len(x), dtype=dtype)
    _apply[(triton.cdiv(len(x), 4096),)](x, y, len(x), NAME=name, BLOCK=4096)
    return y


def test_conversions_are_exhaustively_right():
    """All bf16 values, every midpoint of two e4m3 codes with its fp32 neighbours; all codes and all E8M0 scales."""
    every = torch.arange(256, dtype=torch.uint8)
    codes = every[:127].view(E4M3).float()
    middle = (codes[1:] + codes[:-1]) / 2
    ties = torch.cat([middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(0.0))])
    x = torch.cat([torch.arange(65536).to(torch.uint16).view(torch.bfloat16).float(), ties, -ties, codes, -codes])
    expected = torch.empty(len(x), dtype=torch.uint8)
    ops.cast_e4m3(x, expected)
    assert_same_bytes(apply("to_e4m3", x, torch.uint8), expected, "e4m3")
    assert_same_bits(apply("e4m3_to_f32", every, torch.float32), ref.e4m3_value(every.numpy()), "value")
    assert_same_bits(apply("e8m0_to_f32", every, torch.float32), ref.e8m0_value(every.numpy()), "scale")


@each_case
@pytest.mark.parametrize("kind", ["plain", "wide", "cancel", "tiny"])
def test_quantisers(case, kind):
    for rows, k in ((1, 1), (3, 257), (131, 100)):
        check_quantiser(case, hashed(rows, fits(case, k), seed=rows + k, kind=kind))


@each_case
def test_edges_of_the_rules(case):
    x = edge_blocks(case.block[1])
    check_quantiser(case, x)
    if case.block == SQUARE:  # there the tallest row decides alone
        for i in range(0, len(x), 7):
            check_quantiser(case, x[i : i + 1])


@each_case
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_poison(case, poison):
    x = hashed(2 * case.block[0] + 1, 3 * case.block[1], seed=3)
    x[case.block[0], case.block[1] + 5] = poison
    check_quantiser(case, x)


@each_case
def test_many_tensors_in_one_launch(case, monkeypatch):
    """Through the table: tensors of any sizes, an empty one among them, and one that starts anywhere."""
    shapes = [(1, 128), (130, 128), (0, 128), (17, 384), (3, 160)]
    tensors = [hashed(*s, seed=i, kind="wide") for i, s in enumerate(shapes) if s[1] % case.block[1] == 0]
    tensors.append(hashed(9 * 128 + 1, seed=9)[1:].view(9, 128))
    assert tensors[-1].data_ptr() % 16
    expected = case.quantize(tensors)
    monkeypatch.setattr(quantize, "quantize_kernel", None)  # the kernel of a lone tensor
    table = quantize._table

    def watched_table(matrices):
        by_address.extend(tensor for matrix in matrices for tensor in matrix[:3])
        return table(matrices)

    monkeypatch.setattr(quantize, "_table", watched_table)
    for count in (2, len(tensors) - 1, len(tensors)):
        with on_triton():
            got = case.quantize(tensors[:count])
        for g, e in zip(got, expected, strict=False):
            assert_same_bytes(g.codes, e.codes, "codes")
            assert_same_bytes(g.scales, e.scales, "scales")
    with on_triton():
        assert case.quantize([]) == []
        assert case.quantize([tensors[0][:0]])[0].codes.shape[0] == 0


def check_linear(run):
    """run(): tensors, the same from both."""
    expected = run()
    with on_triton():
        got = run()
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.dtype == e.dtype
        assert_same_bits(g, e, f"output {index}")


SHAPES = [(3, 70, 300, False), (65, 130, 256, True), (130, 33, 32, True)]


@each_linear
@pytest.mark.parametrize(("m", "n", "k", "bias"), SHAPES)
def test_scaled_linear(x_case, w_case, run, options, m, n, k, bias):
    k = fits(x_case, k)
    for kind in ("wide", "cancel"):
        x, w = hashed(m, k, seed=1, kind=kind), w_case.quantize(hashed(n, k, seed=2, kind=kind))
        b = hashed(n, seed=3) if bias else None
        check_linear(lambda: (run(x, w, b, **options), run(x, w, b, out_dtype=torch.float32, **options)))  # noqa: B023


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("m", "n", "k", "bias"), SHAPES)
def test_int4_linear(group, m, n, k, bias):
    k = -(-k // group) * group
    x, b = hashed(m, k, seed=1), hashed(n, seed=3) if bias else None
    w = kernels.quantize_int4_group(hashed(n, k, seed=2, kind="cancel"), group=group)
    check_linear(lambda: (kernels.int4_linear(x, w, b), kernels.int4_linear(x, w, b, out_dtype=torch.float32)))
    y = torch.empty(m, n)
    linear.linear(x, kernels.dequantize_int4_group(w), None if b is None else b.float(), 1, y)
    with on_triton():
        assert_same_bits(kernels.int4_linear(x, w, b, out_dtype=torch.float32), y, "linear on the dequantised weight")


@pytest.mark.parametrize("name", [*LINEARS, "int4"])
def test_gradients(name):
    x, master, bias = hashed(2, 9, 160, seed=1), hashed(37, 160, seed=2), hashed(37, seed=4)
    dy = hashed(2, 9, 37, seed=3)
    if name == "int4":
        w, run, options = kernels.quantize_int4_group(master, group=32), kernels.int4_linear, {}
    else:
        _, w_case, run, options = LINEARS[name]
        w = w_case.quantize(master)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, master, bias)]
        y = run(leaves[0], w, leaves[2], master=leaves[1], **options)
        return torch.autograd.grad(y, leaves, dy)

    check_linear(gradients)


@each_linear
def test_poison_reaches_its_rows_and_columns_only(x_case, w_case, run, options):
    x, w = hashed(20, 256, seed=1), hashed(140, 256, seed=2)
    x[3, 7], w[130, 250] = NAN, INF
    check_linear(lambda: (run(x, w_case.quantize(w), **options),))


def test_unsupported_blocks_are_refused():
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="zerokl::scaled_linear: block=64"):
        quantized_linear.scaled_linear(codes, scales, codes, scales, 64, 1, None, torch.empty(4, 4))
