"""The quantisers and the linear layers on codes, compiled offline: the checks of ``test_compiled.py``, and theirs.

fp8 products for sm_90 and sm_100 alone: elsewhere the backend refuses them, and here is what they would become.
"""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))

from test_compiled import Case, check_ptx
from triton.compiler.errors import CompilationError

from zerokl.kernels import contract
from zerokl.kernels.triton import quantize, quantized_linear
from zerokl.kernels.triton.quantize_config import quantize_config
from zerokl.kernels.triton.quantized_linear_config import int4_linear_config, scaled_linear_config

FP8, MX, INT4 = (f"x_ptr:bf16 code_ptr:{code} scale_ptr:{scale}" for code, scale in (
    ("u8", "fp32"), ("u8", "u8"), ("i32", "bf16")
))  # fmt: skip
FORMATS = {
    "fp8": (quantize.FP8, FP8, 1, 128),
    "fp8_square": (quantize.FP8, FP8, 128, 128),
    "fp8_power_of_two": (quantize.FP8_POWER_OF_TWO, FP8, 1, 128),
    "mx_rceil": (quantize.MX_RCEIL, MX, 1, 32),
    "mx_floor": (quantize.MX_FLOOR, MX, 1, 32),
    "int4": (quantize.INT4, INT4, 1, 128),
}


def quantiser(name: str, back: bool, table: bool) -> Case:
    quantizer, pointers, rows, columns = FORMATS[name]
    config = quantize_config(rows, columns)
    constants = {"BACK": back, "QUANTIZER": quantizer.value, "SQUARE": rows > 1, "GROUPS": config.groups}
    return Case(
        quantize.quantize_table_kernel if table else quantize.quantize_kernel,
        "table_ptr:i64" if table else pointers,
        "count steps" if table else "rows k",
        constants={**constants, "WIDTH": columns, **({"ALIGNED": True} if table else {})},
        warps=config.num_warps,
        fma=False,
        stack=8 if table and back else 0,
    )


def product(name: str, m: int) -> Case:
    config = int4_linear_config(m) if name == "int4" else scaled_linear_config(m)
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "GROUP": config.group}
    flags = {"BIAS": False, "ROUND": True, "EVEN_K": True, **tiles}
    scale = {"fp8": "fp32", "mx": "u8", "int4": "bf16"}[name]
    if name == "int4":
        kernel, pointers = quantized_linear.int4_linear_kernel, "x_ptr:bf16 w_ptr:i32"
        constants = {"WIDTH": 32, "BLOCK_K": 128}
    else:
        kernel, pointers = quantized_linear.scaled_linear_kernel, f"x_ptr:u8 x_scale_ptr:{scale} w_ptr:u8"
        fp8, mx = contract.FP8_BLOCK, contract.MX_BLOCK
        constants = {"BLOCK": fp8, "W_ROWS": fp8} if name == "fp8" else {"BLOCK": mx, "W_ROWS": 1}
    return Case(
        kernel,
        f"{pointers} w_scale_ptr:{scale} bias_ptr:fp32 y_ptr:bf16",
        "m n k",
        constants={**constants, **flags},
        warps=config.num_warps,
        stages=config.num_stages,
        matrix="best",
        step="e4m3" if name == "fp8" else "bf16",
        fma=False,
    )


each_capability = pytest.mark.parametrize("capability", [90, 100])


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_quantisers(name, back, table, capability, tmp_path):
    ptx = check_ptx(quantiser(name, back, table), capability, tmp_path)
    assert "ld.global.v2.b32" in ptx or "ld.global.v4.b32" in ptx, "elements are read in 8 bytes or more"
    assert "cvt.rn.satfinite" not in ptx, "no conversion instruction decides a code"
    assert ("div.rn.f32" in ptx) == (not back and name != "mx_floor")


@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("name", ["mx", "int4"])
def test_products_on_sm_80(name, m, tmp_path):
    check_ptx(product(name, m), 80, tmp_path)


def test_why_fp8_products_are_refused_elsewhere():
    """sm_80 has no such step, and that of sm_89 and sm_120 is ``mma.sync``, which the contract excludes."""
    with pytest.raises(CompilationError, match="fp8e4nv not supported in this architecture"):
        product("fp8", 4096).compile(80)
    for capability in (89, 120):
        ptx = product("fp8", 4096).compile(capability).asm["ptx"]
        assert re.search(r"\bmma\.sync\.\S*e4m3", ptx)
        assert not re.search(r"wgmma|tcgen05", ptx)


@each_capability
@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("name", ["fp8", "mx", "int4"])
def test_products(name, m, capability, tmp_path):
    case = product(name, m)
    ptx = check_ptx(case, capability, tmp_path)
    if name == "fp8" and capability == 90:
        # a block is one chain: the accumulator is added to once a block, not once every few steps
        outputs = case.constants["BLOCK_M"] * case.constants["BLOCK_N"] // (32 * case.warps)
        assert len(re.findall(r"add\.rn\.f32", ptx)) == outputs
