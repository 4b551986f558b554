"""The tensor-core model on the CPU: against exact rationals and against the published model of PyPI mmasim (R1)."""

import pytest
import torch
from data import assert_same_bits, f32
from mmasim.nv_ptx import sim

from zerokl import kernels
from zerokl.kernels.contract import MATRIX_STEPS
from zerokl.kernels.reference import tensor_core

STEPS = {step.instruction: step for step in MATRIX_STEPS}
ELEMENT = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
SPREADS = {"near": 0, "far": 3, "extreme": 30}  # standard deviation of the exponents


def tiles(step, count, spread, seed):
    """Random tiles with exact zeros and terms that cancel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, largest=3.0e38):
        values = torch.randn(shape, generator=generator)
        values *= torch.exp2(torch.randn(shape, generator=generator) * spread)
        values[torch.rand(shape, generator=generator) < 0.15] = 0
        return values.clamp(-largest, largest)

    largest = 448.0 if step.element == "e4m3" else 1e38
    a, b = draw(count, step.rows, step.depth, largest=largest), draw(count, step.columns, step.depth, largest=largest)
    half = step.depth // 2
    a[::2, :, half:], b[::2, :, half:] = -a[::2, :, :half], b[::2, :, :half]
    element = ELEMENT[step.element]
    return a.to(element), b.to(element), draw(count, step.rows, step.columns)


def mmasim_step(step, a, b, c):
    """The published model, tile by tile."""
    kind, shape, element = step.instruction.split(".")
    name = f"{shape}.f32.{element}.{element}"
    model = sim.WGMMA("Hopper", name) if kind == "wgmma" else sim.MMA("Hopper", f"{name}.f32")
    return torch.stack([model(x, y.T, z) for x, y, z in zip(a, b, c, strict=True)])


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("instruction", STEPS)
def test_equals_the_published_model(instruction, spread):
    step = STEPS[instruction]
    a, b, c = tiles(step, 64 * 16 // step.rows, SPREADS[spread], seed=1)
    ours = kernels.matrix_step(a, b, c, instruction=instruction)
    assert_same_bits(ours, mmasim_step(step, a, b, c), instruction)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("instruction", STEPS)
def test_equals_exact_rationals(instruction, spread):
    step = STEPS[instruction]
    a, b, c = (t[:, :16] for t in tiles(step, 2, SPREADS[spread], seed=2))
    full = tiles(step, 2, SPREADS[spread], seed=2)
    ours = kernels.matrix_step(*full, instruction=instruction)[:, :16]
    for tile in range(2):
        expected = tensor_core.matrix_step(f32(a[tile]), f32(b[tile]), c[tile].numpy(), step)
        assert_same_bits(ours[tile], expected, instruction)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("instruction", [name for name in STEPS if name.endswith("bf16")])
def test_a_step_of_zeros_changes_nothing(instruction, spread):
    """What attention's kernels build on: a row that sees none of a block's keys keeps its sum, subnormals too."""
    step = STEPS[instruction]
    a, b, c = tiles(step, 64 * 16 // step.rows, SPREADS[spread], seed=4)
    c[0, :4] = torch.tensor([2.0**-149, -(2.0**-130), 3.0e38, float("inf")])[:, None]
    assert_same_bits(kernels.matrix_step(torch.zeros_like(a), b, c, instruction=instruction), c + 0.0, instruction)


@pytest.mark.parametrize("instruction", STEPS)
def test_special_values(instruction):
    """NaN, Inf and overflow as the published model has them, subnormals kept; a row reaches its own outputs only."""
    step = STEPS[instruction]
    a, b, c = (t[:1].float() for t in tiles(step, 1, 0, seed=3))
    c[0, 0, :] = float("inf")
    c[0, 1, 0], c[0, 1, 1] = float("nan"), -3.4e38
    a[0, 2, 0] = float("nan")
    a[0, 3], c[0, 3] = 0, 1e-44
    a[0, 4], c[0, 4] = 0, -0.0
    if step.element == "bf16":
        a[0, 5, 0], a[0, 6, 0], c[0, 6, 0] = float("inf"), float("inf"), float("-inf")
        a[0, 7] = 3e38
        b[0, 0, 0] = 0
    a, b = a.to(ELEMENT[step.element]), b.to(ELEMENT[step.element])
    ours = kernels.matrix_step(a, b, c, instruction=instruction)
    expected = mmasim_step(step, a, b, c)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))
    assert not torch.isfinite(expected).all()


def test_hopper_keeps_fewer_bits_of_fp8():
    """One product of 1 and one of 2^-14: 13 bits below the largest lose the small one, 25 would not."""
    step = STEPS["wgmma.m64n8k32.e4m3"]
    a, b = torch.zeros(1, step.rows, step.depth), torch.zeros(1, step.columns, step.depth)
    a[..., 0], a[..., 1], b[..., 0], b[..., 1] = 1, 2.0**-7, 1, 2.0**-7
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    sums = kernels.matrix_step(a, b, torch.zeros(1, step.rows, step.columns), instruction=step.instruction)
    assert (sums == 1).all()


def test_refusals():
    a = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    b, c = a[:, :8], torch.zeros(1, 16, 8)
    with pytest.raises(ValueError, match=r"instruction 'mma' is unknown; supported: mma.m16n8k16.bf16"):
        kernels.matrix_step(a, b, c, instruction="mma")
    with pytest.raises(ValueError, match=r"takes a and b in torch.float8_e4m3fn"):
        kernels.matrix_step(a, b, c, instruction="wgmma.m64n8k32.e4m3")
    with pytest.raises(ValueError, match=r"takes a, b, c of shapes \[\(1, 64, 16\)"):
        kernels.matrix_step(a, b, c, instruction="wgmma.m64n8k16.bf16")
