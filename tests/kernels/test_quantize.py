"""Quantisers and the linear layers on their codes: every byte equals the reference, and others' where rules agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from data import assert_same_bits, f32, hashed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerokl import kernels
from zerokl.kernels.ops._common import ops
from zerokl.kernels.reference import arith
from zerokl.kernels.reference import linear as ref_linear
from zerokl.kernels.reference import quantize as ref

NAN, INF = float("nan"), float("inf")
E4M3 = torch.float8_e4m3fn
SQUARE = (128, 128)
drawn = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Case:
    """A quantiser as both sides spell it. The reference is looked up late, so that tests can mutate it."""

    quantize: Callable
    dequantize: Callable
    fake: Callable
    reference: Callable  # f32 matrix -> (raw codes, raw scales)
    value: Callable  # raw codes -> fp32
    scale_value: Callable  # raw scales -> fp32
    block: tuple[int, int]
    whole: bool  # K must be a multiple of the block


def fp8(block, power_of_two):
    options = {"block": block, "power_of_two": power_of_two}
    return Case(
        lambda x: kernels.quantize_fp8_block(x, **options),
        kernels.dequantize_fp8_block,
        lambda x: kernels.fake_quantize_fp8_block(x, **options),
        lambda x: ref.quantize_fp8_block(x, block, power_of_two=power_of_two),
        ref.e4m3_value,
        lambda s: s,
        block,
        False,
    )


def mx(rounding):
    return Case(
        lambda x: kernels.quantize_mxfp8(x, rounding=rounding),
        kernels.dequantize_mxfp8,
        lambda x: kernels.fake_quantize_mxfp8(x, rounding=rounding),
        lambda x: ref.quantize_mxfp8(x, rounding=rounding),
        ref.e4m3_value,
        ref.e8m0_value,
        (1, 32),
        True,
    )


def int4(group):
    return Case(
        lambda x: kernels.quantize_int4_group(x, group=group),
        kernels.dequantize_int4_group,
        lambda x: kernels.fake_quantize_int4_group(x, group=group),
        lambda x: ref.quantize_int4_group(x, group),
        ref.int4_value,
        lambda s: s,
        (1, group),
        True,
    )


CASES = {
    "fp8": fp8((1, 128), False),
    "fp8 square": fp8(SQUARE, False),
    "fp8 power of two": fp8((1, 128), True),
    "fp8 square power of two": fp8(SQUARE, True),
    "mx rceil": mx("rceil"),
    "mx floor": mx("floor"),
    "int4 32": int4(32),
    "int4 128": int4(128),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def raw(codes: torch.Tensor) -> np.ndarray:
    """e4m3 codes as bytes, int4 words as they are."""
    return (codes.view(torch.uint8) if codes.dtype == E4M3 else codes).numpy()


def fits(case: Case, k: int) -> int:
    """k, up to a multiple of the block where the format needs one."""
    return -(-k // case.block[1]) * case.block[1] if case.whole else k


def check_case(case: Case, x: torch.Tensor) -> None:
    """Codes, scales and the dequantised matrix equal the reference's in every byte."""
    q = case.quantize(x)
    codes, scales = case.reference(f32(x))
    np.testing.assert_array_equal(raw(q.codes), codes, "codes")
    assert_same_bits(q.scales, case.scale_value(scales), "scales")
    assert_same_bits(
        case.dequantize(q), ref.dequantize(case.value(codes), case.scale_value(scales), case.block), "value"
    )


def near(*values: float) -> list[float]:
    """bf16 values and their neighbours on both sides."""
    bits = torch.tensor(values).bfloat16().view(torch.int16)
    return torch.cat([bits + d for d in (-1, 0, 1)]).view(torch.bfloat16).tolist()


def edge_blocks(width: int) -> torch.Tensor:
    """[blocks, width]: each block's amax sits on an edge of some rule, its other elements below it, zeros included."""
    tops = near(*[m * 2.0**e for m in (1, 448, 7, 7.5) for e in (-100, -20, -1, 0, 1, 7, 8, 9, 60)])
    tops += near(2.0**-132, 2.0**-127, 2.0**-126, 2.0**-119, 2.0**-118, 448 * 2.0**-127, 448 * 2.0**-126)
    tops += [*near(1e-4, 7e-5, 1e-5, 464, 480, 511, 512, 3.3e38), 0.0, -0.0, 7 * 15.0]
    x = hashed(len(tops), width, seed=7, kind="cancel").float() * torch.tensor(tops)[:, None]
    x[-1, 4] = 2.5 * 15.0  # a tie of int4, which a product with 1 / scale would round up
    x[:, 3] = torch.tensor(tops) * torch.tensor([1.0, -1.0]).repeat(len(tops))[: len(tops)]
    return x.bfloat16()


@each_case
@drawn
@given(
    rows=st.sampled_from([1, 3, 17, 63, 65]),
    k=st.sampled_from([1, 31, 32, 100, 128, 129, 200, 257]),
    kind=st.sampled_from(["plain", "wide", "cancel", "tiny"]),
)
def test_equals_reference(isa, case, rows, k, kind):
    check_case(case, hashed(rows, fits(case, k), seed=rows * 1000 + k, kind=kind))


@each_case
def test_edges_of_the_rules(isa, case):
    """amax at powers of two, at the clamps, subnormal, near overflow; ties, saturation, both zeros."""
    x = edge_blocks(case.block[1])
    check_case(case, x)
    if case.block == SQUARE:  # there the tallest row decides alone
        for i in range(0, len(x), 7):
            check_case(case, x[i : i + 1])


def test_e4m3_cast_is_exhaustively_right(isa):
    """All bf16 values, and every midpoint of two codes with its fp32 neighbours: the reference and torch's cast."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middle = (codes[1:] + codes[:-1]) / 2
    ties = torch.cat([middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(0.0))])
    every = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).float()
    x = torch.cat([every, ties, -ties, codes, -codes])
    got = torch.empty(len(x), dtype=torch.uint8)
    ops.cast_e4m3(x, got)
    np.testing.assert_array_equal(got.numpy(), ref.e4m3(x.numpy()))
    assert (got[x.isnan()] == 0x7F).all()
    number = ~x.isnan()  # torch keeps a NaN's sign, and its older versions do not saturate
    expected = x.clamp(-448, 448).to(E4M3).view(torch.uint8)
    np.testing.assert_array_equal(got[number].numpy(), expected[number].numpy())
    assert_same_bits(
        torch.from_numpy(ref.e4m3_value(got.numpy())[number]), expected.view(E4M3).float()[number], "value"
    )


@each_case
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_poison_surfaces_and_stays_in_its_block(isa, case, poison):
    rows, columns = case.block
    x = hashed(2 * rows + 1, 3 * columns, seed=3)
    clean, clean_value = case.quantize(x), case.dequantize(case.quantize(x))
    x[rows, columns + 5] = poison
    q = case.quantize(x)
    value = case.dequantize(q)
    inside = torch.zeros(x.shape, dtype=torch.bool)
    inside[rows : 2 * rows, columns : 2 * columns] = True
    assert value[inside].isnan().all()
    assert_same_bits(value[~inside], clean_value[~inside], "other blocks")
    changed = (raw(q.codes) != raw(clean.codes)).any(axis=0)
    assert changed.nonzero()[0].min() * x.shape[1] // len(changed) >= columns
    assert changed.nonzero()[0].max() * x.shape[1] // len(changed) < 2 * columns
    check_case(case, x)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.block != SQUARE], ids=[n for n in CASES if "square" not in n]
)
def test_rows_and_threads_do_not_matter(isa, case):
    x = hashed(61, fits(case, 200), seed=5, kind="wide")
    whole = case.quantize(x)
    for i in (0, 1, 16, 37, 60):
        one = case.quantize(x[i])
        assert (raw(one.codes) == raw(whole.codes[i])).all()
        assert_same_bits(one.scales, whole.scales[i], "scales")
    torch.set_num_threads(1)
    assert (raw(case.quantize(x).codes) == raw(whole.codes)).all()


@each_case
def test_many_tensors_in_one_launch(isa, case):
    shapes = [(1, 128), (130, 256), (0, 128), (17, 384), (300, 128)]
    tensors = [hashed(*s, seed=i, kind="wide") for i, s in enumerate(shapes)]
    for got, x in zip(case.quantize(tensors), tensors, strict=True):
        one = case.quantize(x)
        assert (raw(got.codes) == raw(one.codes)).all()
        assert_same_bits(got.scales, one.scales, "scales")
    assert case.quantize([]) == []


@each_case
def test_strided_and_leading_dimensions(case):
    x = hashed(24, 512, seed=1)
    strided = x[:, ::2]
    assert (raw(case.quantize(strided).codes) == raw(case.quantize(strided.contiguous()).codes)).all()
    if case.block != SQUARE:
        q, flat = case.quantize(x.view(2, 3, 4, 512)), case.quantize(x)
        assert (raw(q.codes).reshape(24, -1) == raw(flat.codes)).all()
        assert_same_bits(q.scales.flatten(0, 2), flat.scales, "scales")
        assert_same_bits(case.dequantize(q).flatten(0, 2), case.dequantize(flat), "value")


@each_case
def test_fake_quantize_passes_gradients_straight_through(isa, case):
    x = hashed(9, 256, seed=4, kind="wide").requires_grad_()
    y = case.fake(x)
    assert_same_bits(y, case.dequantize(case.quantize(x)), "value")
    dy = hashed(9, 256, seed=5)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_same_bits(dx, dy, "gradient")
    with torch.no_grad():
        assert_same_bits(case.fake(x), y, "without gradients")


def test_codes_use_their_range():
    """RCEIL and fp8_block never need to saturate, FLOOR does; int4 codes are symmetric."""
    x = edge_blocks(32)
    x = x[x.abs().amax(1) > 2.0**-100]
    amax = x.float().abs().amax(1)
    top = {r: kernels.quantize_mxfp8(x, rounding=r) for r in ("rceil", "floor")}
    scale = {r: q.scales.float()[:, 0] for r, q in top.items()}
    assert (amax / scale["rceil"] <= 448).all()
    assert (amax / scale["rceil"] > 224).all()
    assert (amax / scale["floor"] > 448).any()
    assert (top["floor"].codes.float().abs().amax(1) == 448).any()
    codes = ref.int4_value(kernels.quantize_int4_group(x, group=32).codes.numpy())
    assert codes.min() == -7
    assert codes.max() == 7


# --- other people's implementations -----------------------------------------------------------------------------------


def test_fp8_equals_deepgemm_rule(isa):
    """DeepGEMM's per_token_cast_to_fp8 and per_block_cast_to_fp8, transcribed to torch."""
    x = hashed(256, 384, seed=1, kind="wide")
    for case, view in (("fp8", x.view(256, 3, 128)), ("fp8 square", x.view(2, 128, 3, 128).transpose(1, 2))):
        dims = tuple(range(2, view.dim()))
        scales = view.abs().float().amax(dims).clamp(1e-4) / 448.0
        codes = (view.float() * (1.0 / scales.view(*scales.shape, *[1] * len(dims)))).to(E4M3)
        q = CASES[case].quantize(x)
        assert_same_bits(q.scales, scales, case)
        got = q.codes.view(torch.uint8).view(*view.shape) if case == "fp8" else None
        if got is None:
            got = q.codes.view(torch.uint8).view(2, 128, 3, 128).transpose(1, 2)
        assert (got == codes.view(torch.uint8)).all()


def test_second_opinions():
    """torchao and ml_dtypes, installed apart: SGLang and transformers act differently once they find torchao."""
    folder = Path(sys.prefix) / "second-opinion"
    assert (folder / "torchao").exists(), "missing: make test installs requirements/second-opinion.txt there"
    tests = Path(__file__).with_name("second_opinions.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


def test_mxfp8_rule_in_torch(isa):
    """OCP MX v1.0 by frexp in float64: what torchao's test says, without torchao."""
    x = hashed(200, 256, seed=2, kind="wide")
    amax = x.double().abs().view(200, 8, 32).amax(2)
    mantissa, exponent = torch.frexp(amax / 448)
    for rounding, e in (("rceil", exponent - (mantissa == 0.5).int()), ("floor", torch.frexp(amax)[1] - 1 - 8)):
        q = kernels.quantize_mxfp8(x, rounding=rounding)
        assert (q.scales.view(torch.uint8) == e + 127).all()
        scaled = torch.ldexp(x.double(), -e.repeat_interleave(32, 1)).clamp(-448, 448)
        assert (q.codes.view(torch.uint8) == scaled.float().to(E4M3).view(torch.uint8)).all()


# --- mutants ----------------------------------------------------------------------------------------------------------


def int4_unrounded_scale(amax):
    return np.maximum(amax / ref.INT4_DIVISOR, ref.INT4_SCALE_MIN)


def int4_stored_late(x, group):
    """Codes from the fp32 scale, which is rounded to bf16 only when stored."""
    exact = ref.int4_scale
    try:
        ref.int4_scale = int4_unrounded_scale
        codes, scales = ORIGINAL_INT4(x, group)
    finally:
        ref.int4_scale = exact
    return codes, arith.bf16(scales)


def reciprocal_product_scale(amax):
    scale = np.maximum(amax, ref.FP8_AMAX_MIN) * np.float32(1 / 448)
    return scale, np.float32(1) / scale


def divided_by_scale(amax):
    """TransformerEngine's form: the factor is 448 / amax, the scale its reciprocal."""
    factor = ref.E4M3_MAX / np.maximum(amax, ref.FP8_AMAX_MIN)
    return np.float32(1) / factor, factor


def truncating_e4m3(x):
    up = ORIGINAL_E4M3(x)
    return np.where(np.abs(ref.e4m3_value(up)) > np.abs(x), up - 1, up).astype(np.uint8)


ORIGINAL_INT4, ORIGINAL_E4M3, ORIGINAL_CEIL = ref.quantize_int4_group, ref.e4m3, ref.power_ceil

MUTANTS = {
    "rceil: floor for ceil": ("mx rceil", "power_ceil", lambda x: int(np.frexp(np.float64(x))[1]) - 1),
    "rceil: always up": ("mx rceil", "power_ceil", lambda x: int(np.frexp(np.float64(x))[1])),
    "power of two: floor for ceil": ("fp8 power of two", "power_ceil", lambda x: int(np.frexp(np.float64(x))[1]) - 1),
    "floor: exponent less 7": ("mx floor", "mx_floor", lambda a: max(int(np.frexp(a)[1]) - 8, -127) if a > 0 else -127),
    "floor: rceil instead": ("mx floor", "mx_floor", ref.mx_rceil),
    "fp8: amax times 1 / 448": ("fp8", "fp8_scale", reciprocal_product_scale),
    "fp8: 448 / amax": ("fp8", "fp8_scale", divided_by_scale),
    "fp8: no clamp": ("fp8", "FP8_AMAX_MIN", np.float32(1e-30)),
    "int4: divisor 7.5": ("int4 32", "INT4_DIVISOR", np.float32(7.5)),
    "int4: scale never rounded": ("int4 32", "int4_scale", int4_unrounded_scale),
    "int4: scale rounded after the codes": ("int4 32", "quantize_int4_group", int4_stored_late),
    "int4: no clamp": ("int4 32", "INT4_SCALE_MIN", np.float32(1e-30)),
    "e4m3: truncates": ("fp8", "e4m3", truncating_e4m3),
    "e4m3: saturates at 240": ("mx floor", "E4M3_MAX", np.float32(240)),
}


@pytest.mark.parametrize(("name", "attribute", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_wrong_rules_are_caught(monkeypatch, name, attribute, wrong):
    """The comparison can fail: each plausible wrong rule differs from the kernels on the data of these tests."""
    case = CASES[name]
    data = [hashed(17, 256, seed=1, kind="wide"), edge_blocks(case.block[1])]
    for x in data:
        check_case(case, x)
    monkeypatch.setattr(ref, attribute, wrong)
    with pytest.raises(AssertionError):  # noqa: PT012
        for x in data:
            check_case(case, x)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 64, 65])
@pytest.mark.parametrize("k", [128, 400, 512, 1100])
def test_scale_layouts(rows, k):
    q = kernels.quantize_fp8_block(hashed(rows, k, seed=1, kind="wide"), block=(1, 128), power_of_two=True)
    scales = q.scales
    blocks, aligned = scales.shape[1], -(-rows // 4) * 4
    hopper = kernels.to_hopper_scales(scales)
    assert hopper.stride() == (1, aligned)
    assert hopper.data_ptr() % 16 == 0
    assert_same_bits(kernels.from_hopper_scales(hopper), scales, "Hopper")
    assert_same_bits(
        kernels.dequantize_fp8_block(q._replace(scales=hopper)), kernels.dequantize_fp8_block(q), "read as they lie"
    )
    packed = kernels.to_blackwell_scales(scales)
    assert (packed.dtype, packed.shape, packed.stride()) == (torch.int32, (rows, -(-blocks // 4)), (1, aligned))
    for i in range(rows):  # byte by byte: block b is byte b % 4 of word b // 4
        for b in range(blocks):
            assert packed[i, b // 4].item() >> 8 * (b % 4) & 0xFF == int(np.log2(scales[i, b].item())) + 127
    assert_same_bits(kernels.from_blackwell_scales(packed, blocks), scales, "Blackwell")
    grouped = torch.stack([scales, scales * 2])
    assert_same_bits(kernels.from_blackwell_scales(kernels.to_blackwell_scales(grouped), blocks), grouped, "grouped")


def test_nan_scales_survive_packing():
    scales = torch.tensor([[1.0, NAN], [0.5, 2.0]])
    packed = kernels.to_blackwell_scales(scales)
    assert packed[0, 0].item() == 127 | 0xFF << 8
    assert_same_bits(kernels.from_blackwell_scales(packed, 2), scales, "NaN")


# --- linear layers ----------------------------------------------------------------------------------------------------

LINEARS = {
    "fp8": (CASES["fp8"], CASES["fp8 square"], kernels.fp8_linear, {}),
    "fp8 power of two": (
        CASES["fp8 power of two"],
        CASES["fp8 square power of two"],
        kernels.fp8_linear,
        {"power_of_two": True},
    ),
    "mx": (CASES["mx rceil"], CASES["mx rceil"], kernels.mxfp8_linear, {}),
    "mx floor": (CASES["mx floor"], CASES["mx floor"], kernels.mxfp8_linear, {"rounding": "floor"}),
}
each_linear = pytest.mark.parametrize(("x_case", "w_case", "linear", "options"), LINEARS.values(), ids=LINEARS)


def reference_linear(
    x_case: Case, w_case: Case, x: torch.Tensor, w: torch.Tensor, bias: np.ndarray | None = None
) -> np.ndarray:
    (xc, xs), (wc, ws) = x_case.reference(f32(x)), w_case.reference(f32(w))
    return ref.scaled_linear(
        x_case.value(xc),
        x_case.scale_value(xs),
        w_case.value(wc),
        w_case.scale_value(ws),
        x_case.block[1],
        w_case.block[0],
        bias,
    )


@each_linear
@drawn
@given(
    m=st.sampled_from([1, 3, 13, 17, 63, 65]),
    n=st.sampled_from([1, 31, 64, 130, 150]),
    k=st.sampled_from([1, 32, 127, 128, 160, 257, 300]),
    kind=st.sampled_from(["plain", "wide", "cancel", "tiny"]),
)
def test_linear_equals_reference(isa, x_case, w_case, linear, options, m, n, k, kind):
    k = fits(x_case, k)
    x, w = hashed(m, k, seed=1, kind=kind), hashed(n, k, seed=2, kind=kind)
    expected = reference_linear(x_case, w_case, x, w)
    wq = w_case.quantize(w)
    assert_same_bits(linear(x, wq, out_dtype=torch.float32, **options), expected, "fp32")
    assert_same_bits(linear(x, wq, **options), arith.bf16(expected), "bf16")
    assert_same_bits(linear(x_case.quantize(x), wq), arith.bf16(expected), "from codes")
    bias = hashed(n, seed=3, kind=kind)
    expected = reference_linear(x_case, w_case, x, w, f32(bias))
    assert_same_bits(linear(x, wq, bias, **options), arith.bf16(expected), "bias")


def fused_promotion(x, xs, w, ws, block, w_rows, _):
    """``fma(sx sw, partial, acc)`` instead of a rounded product."""
    acc, spread = np.zeros((len(x), len(w)), np.float32), np.repeat(ws, w_rows, 0)[: len(w)]
    for b in range(xs.shape[1]):
        k = slice(b * block, (b + 1) * block)
        acc = arith.fma(xs[:, b, None] * spread[None, :, b], arith.chain(x[:, k], w[:, k].T), acc)
    return acc


def scales_one_by_one(x, xs, w, ws, block, w_rows, _):
    """``sx (sw partial)`` instead of ``(sx sw) partial``."""
    acc, spread = np.zeros((len(x), len(w)), np.float32), np.repeat(ws, w_rows, 0)[: len(w)]
    for b in range(xs.shape[1]):
        k = slice(b * block, (b + 1) * block)
        acc = acc + xs[:, b, None] * (spread[None, :, b] * arith.chain(x[:, k], w[:, k].T))
    return acc


def descending_blocks(x, xs, w, ws, block, w_rows, _):
    back = np.argsort(-(np.arange(x.shape[1]) // block), kind="stable")
    return ORIGINAL_LINEAR(x[:, back], xs[:, ::-1], w[:, back], ws[:, ::-1], block, w_rows)


def single_fmas(x, xs, w, ws, block, w_rows, _):
    """Ascending k one by one instead of by pairs, odd first."""
    swapped = np.arange(x.shape[1]) ^ 1
    return ORIGINAL_LINEAR(x[:, swapped], xs, w[:, swapped], ws, block, w_rows)


def bias_after_rounding(x, xs, w, ws, block, w_rows, bias):
    return arith.bf16(ORIGINAL_LINEAR(x, xs, w, ws, block, w_rows)) + bias


def bias_first(x, xs, w, ws, block, w_rows, bias):
    """The chain starts from the bias."""
    acc, spread = np.tile(bias, (len(x), 1)), np.repeat(ws, w_rows, 0)[: len(w)]
    for b in range(xs.shape[1]):
        k = slice(b * block, (b + 1) * block)
        acc = acc + xs[:, b, None] * spread[None, :, b] * arith.chain(x[:, k], w[:, k].T)
    return acc


ORIGINAL_LINEAR = ref.scaled_linear


@pytest.mark.parametrize("wrong", [fused_promotion, scales_one_by_one, descending_blocks, single_fmas])
def test_wrong_linears_are_caught(monkeypatch, wrong):
    """As for the quantisers: other orders of the same sums differ from the kernel."""
    x_case, w_case, linear, options = LINEARS["fp8"]
    x, w = hashed(17, 384, seed=1, kind="cancel"), hashed(150, 384, seed=2)
    y = linear(x, w_case.quantize(w), out_dtype=torch.float32, **options)
    assert_same_bits(y, reference_linear(x_case, w_case, x, w), "right")
    monkeypatch.setattr(ref, "scaled_linear", wrong)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(y, reference_linear(x_case, w_case, x, w), "wrong")


@pytest.mark.parametrize("wrong", [bias_after_rounding, bias_first])
def test_wrong_biases_are_caught(monkeypatch, wrong):
    x_case, w_case, linear, options = LINEARS["fp8"]
    x, w, bias = hashed(17, 384, seed=1, kind="cancel"), hashed(150, 384, seed=2), hashed(150, seed=3)
    wq = w_case.quantize(w)

    def check():
        expected = reference_linear(x_case, w_case, x, w, f32(bias))
        assert_same_bits(linear(x, wq, bias, out_dtype=torch.float32, **options), expected, "fp32")
        assert_same_bits(linear(x, wq, bias, **options), arith.bf16(expected), "bf16")

    check()
    monkeypatch.setattr(ref, "scaled_linear", wrong)
    with pytest.raises(AssertionError, match="differ"):
        check()


@each_linear
def test_linear_many_rows(isa, x_case, w_case, linear, options):
    """More rows than one packed chunk holds, and each row alone."""
    x, w = hashed(401, 160, seed=1), hashed(37, 160, seed=2)
    wq = w_case.quantize(w)
    y = linear(x, wq, **options)
    assert_same_bits(y, arith.bf16(reference_linear(x_case, w_case, x, w)), "y")
    for i in (0, 63, 192, 400):
        assert_same_bits(linear(x[i], wq, **options), y[i], f"row {i} alone")


@each_linear
def test_linear_poison_reaches_its_rows_and_columns_only(isa, x_case, w_case, linear, options):
    x, w = hashed(20, 256, seed=1), hashed(300, 256, seed=2)
    clean = linear(x, w_case.quantize(w), **options)
    x[3, 7], w[200, 250] = NAN, INF
    y = linear(x, w_case.quantize(w), **options)
    height = w_case.block[0]
    hit = torch.zeros(y.shape, dtype=torch.bool)
    hit[3] = True
    hit[:, 200 // height * height : (200 // height + 1) * height] = True
    assert y[hit].isnan().all()
    assert_same_bits(y[~hit], clean[~hit], "the rest")


@each_linear
def test_linear_is_close_to_float64(x_case, w_case, linear, options):
    """Each rounding (a block's chain, the promotion's three a block) is below 2^-24 of the sum of magnitudes."""
    x, w = hashed(33, 640, seed=1, kind="cancel"), hashed(150, 640, seed=2)
    y = linear(x, w_case.quantize(w), out_dtype=torch.float32, **options).double()

    def exact(case, t):
        codes, scales = case.reference(f32(t))
        spread = np.repeat(np.repeat(case.scale_value(scales), case.block[0], 0), case.block[1], 1)
        return torch.from_numpy(case.value(codes).astype(np.float64) * spread[: t.shape[0], : t.shape[1]])

    a, b = exact(x_case, x), exact(w_case, w)
    tolerance = (x_case.block[1] + 2 + 640 // x_case.block[1]) * 2.0**-24 * (a.abs() @ b.abs().T)
    assert ((y - a @ b.T).abs() <= tolerance).all()
    # and the quantisation itself costs what 3 bits of mantissa cost
    true = x.double() @ w.double().T
    assert ((y - true).norm() / true.norm()) < 0.08


def bias_gradient(dy: torch.Tensor) -> np.ndarray:
    """R9: dy added over ascending tokens in fp32, rounded once."""
    db = np.zeros(dy.shape[-1], np.float32)
    for row in f32(dy.flatten(0, -2)):
        db = db + row
    return arith.bf16(db)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("m", [1, 17, 65])
def test_int4_linear(isa, group, m):
    x, w = hashed(m, 256, seed=1).requires_grad_(), hashed(70, 256, seed=2, kind="cancel").requires_grad_()
    bias = hashed(70, seed=4).requires_grad_()
    q = kernels.quantize_int4_group(w, group=group)
    codes, scales = ref.quantize_int4_group(f32(w), group)
    value = ref.dequantize(ref.int4_value(codes), scales, (1, group))
    y = kernels.int4_linear(x, q, master=w)
    assert_same_bits(y, ref_linear.linear(f32(x), value), "y")
    fp32 = kernels.int4_linear(x, q, out_dtype=torch.float32)
    assert_same_bits(fp32, ref_linear.linear(f32(x), value, round_output=False), "fp32")
    exact = f32(x).astype(np.float64) @ value.T.astype(np.float64)
    assert (np.abs(f32(fp32) - exact) <= 256 * 2.0**-24 * (np.abs(f32(x)) @ np.abs(value).T)).all()
    dy = hashed(m, 70, seed=3)
    biased = kernels.int4_linear(x, q, bias, master=w)
    assert_same_bits(biased, ref_linear.linear(f32(x), value, f32(bias)), "bias")
    dx, dw, db = torch.autograd.grad(biased, (x, w, bias), dy)
    want_dx, want_dw = ref_linear.linear_backward(f32(x), value, f32(dy), np.zeros((70, 256), np.float32))
    assert_same_bits(db, bias_gradient(dy), "db")
    assert_same_bits(dx, want_dx, "dx")
    assert_same_bits(dw, arith.bf16(want_dw), "dw")


@each_linear
def test_linear_gradients_are_those_of_the_dequantised_operands(isa, x_case, w_case, linear, options):
    x, w = hashed(2, 9, 160, seed=1).requires_grad_(), torch.nn.Parameter(hashed(37, 160, seed=2))
    w.main_grad = torch.ones(37, 160)
    bias = hashed(37, seed=4).requires_grad_()
    y = linear(x, w_case.quantize(w), bias, master=w, **options)
    dy = hashed(2, 9, 37, seed=3)
    y.backward(dy)
    assert_same_bits(bias.grad, bias_gradient(dy), "db")
    (alone,) = torch.autograd.grad(linear(x.detach(), w_case.quantize(w), bias, **options), bias, dy)
    assert_same_bits(alone, bias.grad, "db alone")
    xv, wv = (
        x_case.dequantize(x_case.quantize(x.detach())).flatten(0, 1),
        w_case.dequantize(w_case.quantize(w.detach())),
    )
    want_dx, want_dw = ref_linear.linear_backward(
        f32(xv), f32(wv), f32(dy.flatten(0, 1)), np.ones((37, 160), np.float32)
    )
    assert_same_bits(x.grad.flatten(0, 1), want_dx, "dx")
    assert_same_bits(w.main_grad, want_dw, "dw")
    assert w.grad_added_to_main_grad
    with torch.no_grad():
        assert_same_bits(linear(x, w_case.quantize(w), bias, **options), y, "without gradients")
    from_codes = linear(x_case.quantize(x.detach()), w_case.quantize(w), master=w)
    from_codes.backward(dy)  # codes take no gradient; the weight still does


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_op_argument_and_support():
    x = hashed(4, 256, seed=1)
    q, m, i = (
        kernels.quantize_fp8_block(x, block=(1, 128)),
        kernels.quantize_mxfp8(x),
        kernels.quantize_int4_group(x, group=32),
    )
    square = kernels.quantize_fp8_block(x, block=SQUARE)
    for call, words in (
        (lambda: kernels.quantize_fp8_block(x.float(), block=SQUARE), ["quantize_fp8_block", "float32", "bfloat16"]),
        (lambda: kernels.quantize_fp8_block(x, block=(1, 64)), ["quantize_fp8_block", "(1, 64)", "(1, 128)"]),
        (lambda: kernels.quantize_fp8_block(x[None], block=SQUARE), ["quantize_fp8_block", "[N, K]"]),
        (lambda: kernels.quantize_fp8_block(x[:, :0], block=(1, 128)), ["quantize_fp8_block", "positive"]),
        (lambda: kernels.quantize_mxfp8(x[:, :33]), ["quantize_mxfp8", "multiple of 32"]),
        (lambda: kernels.quantize_mxfp8([x, x[:, :16]]), ["quantize_mxfp8", "multiple of 32"]),
        (lambda: kernels.quantize_mxfp8(x, rounding="even"), ["quantize_mxfp8", "even", "rceil"]),
        (lambda: kernels.quantize_int4_group(x, group=64), ["quantize_int4_group", "group=64", "32, 128"]),
        (lambda: kernels.quantize_int4_group(x[:, :160], group=128), ["quantize_int4_group", "multiple of 128"]),
        (lambda: kernels.dequantize_fp8_block(q._replace(scales=q.scales[:1])), ["dequantize_fp8_block", "scales"]),
        (lambda: kernels.dequantize_fp8_block(q._replace(codes=x)), ["dequantize_fp8_block", "codes", "e4m3"]),
        (lambda: kernels.dequantize_mxfp8(m._replace(scales=q.scales)), ["dequantize_mxfp8", "e8m0"]),
        (lambda: kernels.dequantize_int4_group(i._replace(scales=i.scales[:, :3])), ["dequantize_int4_group"]),
        (lambda: kernels.fake_quantize_mxfp8(x[:, :31]), ["fake_quantize_mxfp8", "multiple of 32"]),
        (lambda: kernels.to_blackwell_scales(q.scales), ["to_blackwell_scales", "power_of_two=True"]),
        (lambda: kernels.from_blackwell_scales(q.scales, 2), ["from_blackwell_scales", "int32"]),
        (lambda: kernels.to_hopper_scales(q.scales.double()), ["to_hopper_scales", "float32"]),
        (lambda: kernels.fp8_linear(x, q), ["fp8_linear", "w has blocks (1, 128)"]),
        (lambda: kernels.fp8_linear(square, square), ["fp8_linear", "x has blocks (128, 128)"]),
        (lambda: kernels.fp8_linear(x[:, :128], square), ["fp8_linear", "do not fit"]),
        (lambda: kernels.fp8_linear(x, square, out_dtype=torch.float16), ["fp8_linear", "float16"]),
        (lambda: kernels.fp8_linear(x, square, master=x[:2]), ["fp8_linear", "master"]),
        (lambda: kernels.fp8_linear(x, square._replace(codes=square.codes.to("meta"))), ["fp8_linear", "meta"]),
        (lambda: kernels.fp8_linear(x, square, x[0, :3]), ["fp8_linear", "bias", "[N]"]),
        (lambda: kernels.fp8_linear(x, square, torch.ones(4)), ["fp8_linear", "bias", "float32"]),
        (lambda: kernels.mxfp8_linear(m._replace(scales=m.scales[:2]), m), ["mxfp8_linear", "scales"]),
        (lambda: kernels.int4_linear(x[:, :128], i), ["int4_linear", "does not fit"]),
        (lambda: kernels.int4_linear(x, i._replace(scales=i.scales[:2])), ["int4_linear", "scales", "do not fit"]),
        (lambda: kernels.int4_linear(x, i, x[0]), ["int4_linear", "bias", "[N]"]),
        (lambda: kernels.quantize_mxfp8([x, x.to("meta")]), ["quantize_mxfp8", "meta", "cpu"]),
    ):
        with pytest.raises(ValueError, match=r"zerokl\.kernels") as error:
            call()
        for word in words:
            assert word in str(error.value)
