"""The cases of `gate_cases`, in a process of their own."""

import subprocess
import sys
from pathlib import Path


def test_ranks_stop_and_go_on_together():
    cases = Path(__file__).with_name("gate_cases.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
