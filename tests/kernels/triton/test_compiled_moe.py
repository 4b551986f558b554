"""The kernels of mixture-of-experts layers, compiled as in ``test_compiled.py``. Sizes: Qwen3-30B-A3B, 128 experts."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_compiled import Case, check_ptx, tiles_of

from zerokl.kernels.triton import grouped_linear, moe, router
from zerokl.kernels.triton.linear_config import linear_config

OFFSETS = "offsets_ptr:i64"
DW = linear_config(2048, 768, 1)


def grouped_case(rows: int, stack: int = 0, **options) -> Case:
    """The experts' product as linear_config tiles it; k contiguous in the weights, or (DX) not. rows: of an expert."""
    unit = {"w_column": 1} if options.pop("DX", False) else {"w_row": 1}
    flags = {"SEGMENTS": 1, "ROUND": True, "EVEN_K": True, "EXPERTS": 128, **options}
    config = linear_config(rows, 4096, flags["SEGMENTS"])
    return Case(
        grouped_linear.grouped_kernel,
        f"a_ptr:bf16 w_ptr:bf16 {OFFSETS} y_ptr:{'bf16' if flags['ROUND'] else 'fp32'}",
        f"experts n depth tiles_m a_row w_expert {' '.join({'w_row', 'w_column'} - unit.keys())}",
        constants={**flags, **unit, **tiles_of(config)},
        warps=config.num_warps,
        stages=config.num_stages,
        stack=stack,
        matrix="mma" if config.block_m == 16 else "best",
        fma=False,
    )


def router_case(**options) -> Case:
    constants = {"SIGMOID": False, "BIAS": True, "RENORMALIZE": True, "REPLAY": False, "SLOTS": 8}
    return Case(
        router.router_topk_kernel,
        "logits_ptr:fp32 bias_ptr:fp32 weight_ptr:fp32 index_ptr:i64",
        "experts slots groups keep judges",
        "scale",
        constants | options,
        warps=1,
    )


def router_backward_case(stack: int | tuple[int, int, int] = 0, **options) -> Case:
    return Case(
        router.router_topk_backward_kernel,
        "logits_ptr:fp32 index_ptr:i64 dweight_ptr:fp32 dlogits_ptr:fp32",
        "experts slots",
        "scale",
        {"RENORMALIZE": True, **options},
        warps=1,
        stack=stack,
    )


CASES = {
    "router_topk": router_case(GROUPS=1, SIZE=128, groups=1, keep=1, judges=1),
    "router_topk_most_experts": router_case(GROUPS=1, SIZE=router.MAX_EXPERTS),
    "router_topk_groups": router_case(SIGMOID=True, GROUPS=8, SIZE=32),
    "router_replay": router_case(REPLAY=True, GROUPS=1, SIZE=128),
    "router_topk_backward": router_backward_case((16, 0, 0), SIGMOID=False, EXPERTS=128),
    "router_topk_backward_sigmoid": router_backward_case(SIGMOID=True, EXPERTS=router.MAX_EXPERTS),
    "gather": Case(
        moe.gather_kernel,
        "x_ptr:bf16 source_ptr:i64 y_ptr:bf16",
        "n",
        constants={"SLOTS": 8, "BLOCK": 1024},
        fma=False,
    ),
    "combine": Case(
        moe.combine_kernel,
        "y_ptr:bf16 position_ptr:i64 weight_ptr:fp32 shared_ptr:bf16 out_ptr:bf16",
        "n",
        constants={"WEIGHT": True, "SHARED": True, "SLOTS": 8, "BLOCK": 1024},
    ),
    "permute_backward": Case(
        moe.combine_kernel,
        "y_ptr:bf16 position_ptr:i64 weight_ptr:i64 shared_ptr:bf16 out_ptr:bf16",
        "n",
        constants={"WEIGHT": False, "SHARED": False, "SLOTS": 8, "BLOCK": 1024},
        fma=False,
    ),
    "combine_backward": Case(
        moe.combine_backward_kernel,
        "y_ptr:bf16 position_ptr:i64 weight_ptr:fp32 dout_ptr:bf16 dy_ptr:bf16 dweight_ptr:fp32",
        "rows n slots",
        constants={"ROWS": 4},
    ),
    "grouped_linear": grouped_case(4096),
    "grouped_linear_part": grouped_case(4096, ROUND=False),
    "grouped_linear_small": grouped_case(8),
    "grouped_linear_tree_of_8": grouped_case(4096, 8, SEGMENTS=8),
    "grouped_linear_dx": grouped_case(4096, DX=True),
    "grouped_linear_dw": Case(
        grouped_linear.grouped_dw_kernel,
        f"dy_ptr:bf16 x_ptr:bf16 {OFFSETS} dw_ptr:fp32",
        "n k",
        constants={"BLOCK_N": DW.block_m, "BLOCK_K": DW.block_n, "BLOCK_R": DW.block_k},
        warps=DW.num_warps,
        stages=DW.num_stages,
        matrix="best",
        stack=24,
        fma=False,
    ),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_ptx(name, capability, tmp_path):
    check_ptx(CASES[name], capability, tmp_path)
