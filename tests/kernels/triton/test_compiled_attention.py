"""The attention kernels compiled offline as ``test_compiled.py`` does, each with the configuration its sizes get.

Besides PTX and stack: how often the loop over keys (of key gradients: over queries) touches local memory. What is
spilled elsewhere waits there for the end of a segment, which costs little.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_compiled import Case, check_ptx

from zerokl.kernels.triton import attention, attention_backward, attention_split
from zerokl.kernels.triton.attention_config import (
    delta_config,
    forward_config,
    key_gradient_config,
    merge_config,
    query_gradient_config,
    segment_config,
)

triton = pytest.importorskip("triton")

PACKED = "q_ptr:bf16 k_ptr:bf16 v_ptr:bf16 start_ptr:i32"
STATE = "m_ptr:fp32 mass_ptr:fp32 o_ptr:fp32"
SIZES = "sequences kv_heads group window"


def case(kernel, pointers, integers, floats, config, dim=0, v_dim=0, **constants):
    """``kernel`` as ``config`` has it; head dims where it takes them."""
    dims = {"D": dim, "D_PAD": triton.next_power_of_2(dim), "DV": v_dim, "DV_PAD": triton.next_power_of_2(v_dim)}
    constants |= {name: dims[name] for name in dims.keys() & set(kernel.arg_names)}
    constants |= {name: getattr(config, name.lower()) for name in {"ROWS", "KEYS"} & set(kernel.arg_names)}
    return Case(kernel, pointers, integers, floats, constants, config.num_warps, config.num_stages)


def forward(rows, dim, v_dim, paged=False, sinks=False):
    return lambda capability: case(
        attention.attention_kernel,
        f"{PACKED} length_ptr:i32 table_ptr:i32 sink_ptr:fp32 out_ptr:bf16 lse_ptr:fp32",
        f"{SIZES} page_size max_pages",
        "c",
        forward_config(rows, dim, v_dim, capability >= 100),
        dim,
        v_dim,
        PAGED=paged,
        CAUSAL=True,
        SINKS=sinks,
    )


def segment(dim, v_dim):
    return lambda _: case(
        attention_split.segment_kernel,
        f"{PACKED} length_ptr:i32 table_ptr:i32 {STATE}",
        f"rows {SIZES} page_size max_pages",
        "c",
        segment_config(),
        dim,
        v_dim,
    )


def gradient(kernel, outputs, config, dim, v_dim):
    pointers = f"{PACKED} lse_ptr:fp32 delta_ptr:fp32 dout_ptr:bf16 {outputs}"
    return lambda _: case(kernel, pointers, SIZES, "c scale", config(dim, v_dim), dim, v_dim, CAUSAL=True)


def query_gradient(dim, v_dim):
    return gradient(attention_backward.query_gradient_kernel, "dq_ptr:bf16", query_gradient_config, dim, v_dim)


def key_gradient(dim, v_dim):
    outputs = "dk_ptr:bf16 dv_ptr:bf16"
    return gradient(attention_backward.key_gradient_kernel, outputs, key_gradient_config, dim, v_dim)


# name: (case of a capability, matrix instruction, bytes of stack and local accesses in the loop on sm_90 and sm_100)
MATRIX_CASES = {
    "prefill_64": (forward(4096, 64, 64), "best", (16, 0), (0, 0)),
    "prefill_128": (forward(4096, 128, 128), "best", (64, 24), (0, 0)),
    "prefill_192_128_sinks": (forward(4096, 192, 128, sinks=True), "best", (136, 240), (0, 0)),
    "prefill_256": (forward(4096, 256, 256), "mma", (72, 80), (0, 0)),
    "decode_80_sinks": (forward(1, 80, 80, paged=True, sinks=True), "mma", (0, 0), (0, 0)),
    "segment_128": (segment(128, 128), "mma", (0, 0), (0, 0)),
    "query_gradient_64": (query_gradient(64, 64), "best", (0, 0), (0, 0)),
    "query_gradient_128": (query_gradient(128, 128), "best", (0, 0), (0, 0)),
    "query_gradient_256": (query_gradient(256, 256), "mma", (0, 0), (0, 0)),
    "key_gradient_64": (key_gradient(64, 64), "best", (0, 0), (0, 0)),
    "key_gradient_128": (key_gradient(128, 128), "best", (0, 0), (0, 0)),
    "key_gradient_192_128": (key_gradient(192, 128), "mma", (0, 0), (0, 0)),
}

OTHER_CASES = {
    "merge": case(
        attention_split.merge_kernel,
        f"start_ptr:i32 length_ptr:i32 sink_ptr:fp32 {STATE} out_ptr:bf16",
        f"rows {SIZES}",
        "",
        merge_config(),
        v_dim=128,
        SINKS=True,
    ),
    "delta": case(
        attention_backward.delta_kernel,
        "dout_ptr:bf16 out_ptr:bf16 delta_ptr:fp32 sink_ptr:fp32 lse_ptr:fp32 dsink_ptr:fp32",
        "rows heads dim",
        "",
        delta_config(),
        SINKS=True,
    ),
    "sink_gradient": Case(
        attention_backward.sink_gradient_kernel,
        "row_ptr:fp32 dsink_ptr:fp32",
        "tokens heads",
        constants={"HEADS": delta_config().rows},
        warps=1,
        fma=False,
    ),
}


def local_accesses(cubin: Path) -> int:
    """Loads and stores of local memory in the shortest loop that holds a matrix instruction."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    out = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", out)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA.*?0x([0-9a-f]+)", text))]
    loops = [[text for at, text in code if begin <= at <= end] for begin, end in jumps if begin < end]
    hot = min((loop for loop in loops if any("MMA" in text for text in loop)), key=len)
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in hot)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", MATRIX_CASES)
def test_products(name, capability, tmp_path):
    make, matrix, stack, loop = MATRIX_CASES[name]
    newer = int(capability == 100)
    check_ptx(Case(**vars(make(capability)) | {"matrix": matrix, "stack": stack[newer]}), capability, tmp_path)
    assert local_accesses(tmp_path / "kernel.cubin") <= loop[newer]


STACK_ON_80 = {
    "prefill_64": 640,
    "prefill_128": 792,
    "prefill_192_128_sinks": 744,
    "prefill_256": 88,
    "query_gradient_64": 3064,
    "query_gradient_128": 112,
    "key_gradient_64": 32,
    "key_gradient_128": 136,
}
"""What spills on sm_80, for which no tile is chosen: the backend refuses it."""


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_products_on_sm_80(name, tmp_path):
    case = MATRIX_CASES[name][0](80)
    check_ptx(Case(**vars(case) | {"matrix": "mma", "stack": STACK_ON_80.get(name, 0)}), 80, tmp_path)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", OTHER_CASES)
def test_other_kernels(name, capability, tmp_path):
    check_ptx(OTHER_CASES[name], capability, tmp_path)
