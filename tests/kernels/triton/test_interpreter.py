"""Runs each ``interpreter_cases*.py`` in a process of its own: triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "cases", sorted(Path(__file__).parent.glob("interpreter_cases*.py")), ids=lambda path: path.stem
)
def test_kernels_equal_the_reference_in_the_interpreter(cases):
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
