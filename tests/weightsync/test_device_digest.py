"""xxh3_128 in a Triton kernel: the host's digests in the interpreter, and code for three generations of GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from zerokl.kernels.triton._math import launch_options
from zerokl.weightsync.device_digest import _accumulate

INTERPRETED = Path(__file__).parent / "interpreted_digest.py"


def test_digests_equal_the_hosts():
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # triton reads it when it is imported
    command = [sys.executable, INTERPRETED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "19 digests equal\n"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("strided", [False, True])
def test_it_compiles_without_spilling(capability, strided):
    signature = {"runs_ptr": "*i64", "words_ptr": "*u64", "out_ptr": "*u64", "STRIDED": "constexpr"}
    source = ASTSource(_accumulate, signature, constexprs={(3,): strided})
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=launch_options(4))
    ptx = kernel.asm["ptx"]
    assert "st.global" in ptx
    assert ".local" not in ptx
