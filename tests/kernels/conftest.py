import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from zerokl.kernels.ops._common import ops

ISA = {0: "scalar", 1: "avx2", 2: "avx512", 3: "avx512bf16"}


@pytest.fixture(params=list(ISA), ids=ISA.get)
def isa(request):
    """Run the test on each instruction set this CPU has."""
    best = ops.set_isa(-1)
    if request.param > best:
        pytest.skip(f"this CPU has no {ISA[request.param]}")
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(best)


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
