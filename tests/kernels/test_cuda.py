"""The CUDA sources, compiled by nvcc for Hopper and Blackwell: no GPU needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from zerokl.kernels.ops.tensor_core import has_cuda_part

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = {"sm_90a": {"HGMMA.64x8x16.F32.BF16", "QGMMA.64x8x32.F32.E4M3.E4M3", "HMMA.16816.F32.BF16"},
          "sm_100a": {"HMMA.16816.F32.BF16"}}  # fmt: skip


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The build's own CUDA target, warnings as errors."""
    build = tmp_path_factory.mktemp("cuda")
    cmake = Path(sys.executable).with_name("cmake")
    run(cmake, "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}", "-DZEROKL_CUDA=ON",
        f"-DZEROKL_OUTPUT_DIR={build}", "-DZEROKL_OUTPUT_NAME=_C")  # fmt: skip
    run(cmake, "--build", build, "--target", "zerokl_cuda")
    found = list(build.rglob("*.cu.o"))
    assert found
    return found


def test_no_spills_on_any_chip(objects):
    for path in objects:
        usage = run(TOOLS / "cuobjdump", "-res-usage", path)
        assert set(re.findall(r"arch = (\w+)", usage)) == MATRIX.keys()
        stacks = [int(size) for size in re.findall(r"STACK:(\d+)", usage)]
        assert stacks, usage
        assert not any(stacks), usage


def test_the_matrix_instructions_are_the_chips_own(objects):
    (path,) = (p for p in objects if p.name.startswith("tensor_core"))
    for arch, section in re.findall(r"arch = (\w+)(.*?)(?=Fatbin|\Z)", run(TOOLS / "cuobjdump", "-sass", path), re.S):
        assert set(re.findall(r"\b[HQ]G?MMA\.\S+", section)) == MATRIX[arch]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA, so the build has the CUDA part")
def test_a_torch_without_cuda_gets_the_cpu_part_alone():
    assert not has_cuda_part()
