"""Every Triton kernel compiled offline for sm_80, sm_90 and sm_100: what its PTX may and may not hold. No GPU needed.

Contraction is off, division and square root are IEEE, nothing flushes subnormals, no float atomics, spills bounded.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zerokl.kernels.triton import activation, linear, logprob, norm, rotary, sampling, selected_logprob
from zerokl.kernels.triton._math import launch_options
from zerokl.kernels.triton.linear_config import LinearConfig, linear_config

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
STEPS = {
    "bf16": {80: r"m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", 90: r"k16\.f32\.bf16\.bf16", 100: "kind::f16"},
    "e4m3": {90: r"k32\.f32\.e4m3\.e4m3", 100: "kind::f8f6f4"},
}
"""The matrix step on each kind of operands, sums in fp32."""

FORBIDDEN = {
    "float atomics": r"\b(atom|red)\.\S*\.(f16|bf16|f32|f64)",
    "approximate arithmetic": r"\.approx",
    "division that is not IEEE": r"\bdiv\.full",
    "flush to zero": r"\.ftz",
    "a product or sum that ptxas may contract": r"\b(mul|add|sub)\.f32",
}


ALIGNED = frozenset(
    ("n", "k", "depth", "dim", "a_row", "b_row", "a_column", "b_column", "y_row", "w_expert", "w_row", "w_column")
)


@dataclass(frozen=True)
class Case:
    """One kernel with one representative configuration.

    ``matrix``: the instruction tl.dot becomes: none, mma (mma.sync everywhere) or best (the capability's own).
    ``step``: the operands of its steps, a key of STEPS.
    ``aligned``: arguments that are multiples of 16, as a launch knows them.
    ``stack``: bytes of spilled registers a thread may have, one bound for all capabilities or one for each.
    """

    kernel: object
    pointers: str
    integers: str = ""
    floats: str = ""
    constants: dict = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    matrix: str = "none"
    step: str = "bf16"
    fma: bool = True
    stack: int | tuple[int, int, int] = 0
    aligned: frozenset[str] = ALIGNED

    def compile(self, capability: int):
        types = {p.split(":")[0]: "*" + p.split(":")[1] for p in self.pointers.split()}
        types |= dict.fromkeys(self.integers.split(), "i32") | dict.fromkeys(self.floats.split(), "fp32")
        types |= dict.fromkeys(self.constants, "constexpr")
        signature = {name: types[name] for name in self.kernel.arg_names}
        aligned = self.aligned - self.constants.keys()
        aligned = [(i,) for i, name in enumerate(signature) if name.endswith("_ptr") or name in aligned]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=self.constants,
            attrs={at: [["tt.divisibility", 16]] for at in aligned},
        )
        options = launch_options(self.warps, self.stages)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes, path: Path) -> tuple[int, int]:
    """(registers, stack bytes) of a thread. Spilled registers live on the stack."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    out = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found, out
    return int(found[1]), int(found[2])


FILTER = "temperature_ptr:fp32 cut_ptr:fp32 cut_index_ptr:i64"


def tiles_of(config: LinearConfig) -> dict[str, int]:
    """What a kernel that walks tiles of a product takes from linear_config."""
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": config.group}


def matmul_case(m: int, n: int, stack: int = 0, **options) -> Case:
    """The matrix product as linear_config tiles it, k contiguous in both operands unless it is a weight gradient."""
    weight_gradient = options.get("CONTINUE", False)
    unit = {"a_row": 1, "b_column": 1} if weight_gradient else {"a_column": 1, "b_row": 1}
    strides = {"a_row", "a_column", "b_row", "b_column"} - unit.keys()
    flags = {"BIAS": False, "CONTINUE": False, "ROUND": True, "SEGMENTS": 1, "EVEN_K": True, **options}
    config = linear_config(m, n, flags["SEGMENTS"])
    return Case(
        linear.matmul_kernel,
        f"a_ptr:bf16 b_ptr:bf16 bias_ptr:fp32 y_ptr:{'fp32' if weight_gradient else 'bf16'}",
        f"m n depth {' '.join(sorted(strides))}",
        constants={**flags, **unit, **tiles_of(config)},
        warps=config.num_warps,
        stages=config.num_stages,
        stack=stack,
        matrix="mma" if config.block_m == 16 else "best",
        fma=False,
        aligned=ALIGNED | {"m"} if weight_gradient else ALIGNED,
    )


def rotary_case(**options) -> Case:
    """A whole head of 128 in halves, or half of one in neighbours."""
    return Case(
        rotary.rotary_kernel,
        "x_ptr:bf16 position_ptr:i64 table_ptr:fp32 y_ptr:bf16",
        "heads dim rotary_dim x_row x_head",
        constants={"INVERSE": False, "HEADS": 16, **options},
    )


CASES = {
    "rms_norm": Case(
        norm.rms_norm_kernel,
        "x_ptr:bf16 residual_ptr:bf16 w_ptr:bf16 y_ptr:bf16 sum_ptr:bf16",
        "rows n",
        "eps",
        {"RESIDUAL": True, "ROWS": 4},
        stages=4,
    ),
    "rms_norm_backward": Case(
        norm.rms_norm_backward_kernel,
        "x_ptr:bf16 w_ptr:bf16 dy_ptr:bf16 dsum_ptr:bf16 dx_ptr:bf16 inverse_ptr:fp32",
        "rows n",
        "eps",
        {"DSUM": True, "ROWS": 4},
        stages=4,
    ),
    "rms_norm_dw": Case(
        norm.rms_norm_dw_kernel,
        "x_ptr:bf16 dy_ptr:bf16 inverse_ptr:fp32 dw_ptr:fp32",
        "rows n",
        constants={"COLUMNS": 32},
        warps=1,
    ),
    "silu_and_mul": Case(
        activation.silu_and_mul_kernel,
        "x_ptr:bf16 weight_ptr:fp32 y_ptr:bf16",
        "n",
        constants={"WEIGHT": True, "BLOCK": 1024},
    ),
    "silu_and_mul_backward": Case(
        activation.silu_and_mul_backward_kernel,
        "x_ptr:bf16 weight_ptr:fp32 dy_ptr:bf16 dx_ptr:bf16",
        "n",
        constants={"WEIGHT": True, "BLOCK": 1024},
    ),
    "weighted_backward": Case(
        activation.weighted_backward_kernel,
        "x_ptr:bf16 weight_ptr:fp32 dy_ptr:bf16 dx_ptr:bf16 dweight_ptr:fp32",
        "rows n",
        constants={"ROWS": 4},
    ),
    "rotary": rotary_case(INTERLEAVED=False, HALF=64, REST=0),
    "rotary_interleaved_partial": rotary_case(INTERLEAVED=True, HALF=32, REST=64),
    "segment_sum": Case(
        logprob.segment_sum_kernel,
        f"logits_ptr:fp32 {FILTER} target_ptr:i64 hit_ptr:fp32 sums_ptr:fp32",
        "rows row_stride vocab width first_segment",
        constants={"MOMENT": True, "ROWS": 4},
        stages=4,
    ),
    "merge": Case(
        logprob.merge_kernel,
        "sums_ptr:fp32 hit_ptr:fp32 logprob_ptr:fp32 entropy_ptr:fp32 state_ptr:fp32",
        "rows",
        constants={"ENTROPY": True, "ROWS": 16},
        warps=1,
    ),
    "scale": Case(
        logprob.scale_kernel,
        "logits_ptr:fp32 temperature_ptr:fp32 z_ptr:fp32",
        "vocab",
        constants={"BLOCK": 1024},
        fma=False,
    ),
    "cut": Case(
        logprob.cut_kernel,
        "z_ptr:fp32 order_ptr:i64 state_ptr:fp32 top_p_ptr:fp32 top_k_ptr:i32 cut_ptr:fp32 cut_index_ptr:i64",
        "vocab",
        warps=1,
    ),
    "gradient": Case(
        selected_logprob.gradient_kernel,
        f"logits_ptr:fp32 {FILTER} target_ptr:i64 state_ptr:fp32 grad_ptr:fp32 dz_ptr:bf16",
        "first count",
        constants={"BLOCK": 1024},
    ),
    "draw": Case(
        sampling.draw_kernel,
        f"logits_ptr:fp32 {FILTER} greedy_ptr:i32 seed_ptr:i64 position_ptr:i64 best_ptr:fp32 where_ptr:i32",
        "vocab width",
        constants={"BLOCK": 1024},
    ),
    "choose": Case(sampling.choose_kernel, "best_ptr:fp32 where_ptr:i32 token_ptr:i64", warps=1, fma=False),
    "linear": matmul_case(4096, 4096),
    "linear_small": matmul_case(1, 4096),
    "linear_64": matmul_case(64, 4096),
    "linear_narrow": matmul_case(4096, 1024),
    "linear_tree_of_2": matmul_case(4096, 4096, SEGMENTS=2, BIAS=True),
    "linear_tree_of_8": matmul_case(4096, 4096, 8, SEGMENTS=8),
    "linear_dw": matmul_case(4096, 4096, CONTINUE=True, ROUND=False),
    "bias_grad": Case(
        linear.bias_grad_kernel, "dy_ptr:bf16 db_ptr:fp32", "rows n", constants={"COLUMNS": 128}, warps=1, fma=False
    ),
    "embedding": Case(
        linear.embedding_kernel, "id_ptr:i64 w_ptr:bf16 y_ptr:bf16", "n", constants={"COLUMNS": 1024}, fma=False
    ),
    "embedding_dw": Case(
        linear.embedding_dw_kernel,
        "id_ptr:i64 order_ptr:i64 dy_ptr:bf16 dw_ptr:fp32",
        "tokens n",
        constants={"COLUMNS": 128},
        warps=1,
        fma=False,
    ),
}


def check_ptx(case: Case, capability: int, path: Path) -> str:
    """Compile, check what every kernel must keep, return the PTX."""
    compiled = case.compile(capability)
    ptx = re.sub(r"//.*", "", compiled.asm["ptx"])
    for what, pattern in FORBIDDEN.items():
        found = re.search(pattern, ptx)
        assert not found, f"{what}: {found.group(0)}"
    wanted = {"none": None, "mma": 80, "best": capability}[case.matrix]
    present = {generation for generation, pattern in MATRIX.items() if re.search(pattern, ptx)}
    assert present == ({wanted} if wanted else set())
    assert ("fma.rn.f32" in ptx) == case.fma
    if wanted:
        steps = re.findall(rf"(?:{MATRIX[wanted]})\S+", ptx)
        assert all(re.search(STEPS[case.step][wanted], step) for step in steps), steps
        assert re.search(r"cp\.async\.cg\S* .*, 0x10,", ptx), "operands travel in 16-byte pieces"
        assert "scale_ptr" in case.pointers or "ld.global.b16" not in ptx, "and not element by element"
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    registers, stack = resources(compiled.asm["cubin"], path / "kernel.cubin")
    bound = case.stack if isinstance(case.stack, int) else case.stack[list(MATRIX).index(capability)]
    assert stack <= bound, f"{stack} bytes of stack, {registers} registers"
    return ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_ptx(name, capability, tmp_path):
    check_ptx(CASES[name], capability, tmp_path)
