"""Every op against torch: python -m pytest bench/kernels (needs pytest-benchmark; a GPU is used where there is one).

Timings decide nothing here; a run prints them. Goals on a CPU: linear 0.9 of torch, attention, norm, SwiGLU and
log-probabilities twice torch's eager ops.
"""

import pytest
import torch

from zerokl.bench.kernels.cases import cases
from zerokl.bench.kernels.conftest import DEVICE

torch.manual_seed(0)
CASES = {f"{case.op} {case.shape}": case for case in cases(DEVICE)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["zerokl", "torch"])
def test_speed(benchmark, name, who):
    case = CASES[name]
    benchmark.group = name
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, goal=case.goal)
    call = case.ours if who == "zerokl" else case.torch

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
