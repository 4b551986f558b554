"""Every parallel layout scores the same tokens: `python -m zerokl.bench.layouts`.

One launch of four ranks (gloo, or NCCL with a GPU each) runs the layouts one after the other on tiny random models.
Each row of the table compares, bit by bit, with the model on one rank and the same number of row-parallel segments.
Below them stand rows in which SGLang, on one rank and on several, samples what Megatron's one rank scores.
Exits with 1 if a token of any layout differs, or none where the order of addition does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zerokl.bench import rollout_layouts

RANKS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--timeout", type=float, default=600, help="seconds Megatron's part may take")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    rows = run(options.device, options.timeout) + rollout_layouts.rows(options.device)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    sys.exit(0 if all(as_it_should(row) for row in rows) else 1)


def as_it_should(row: dict[str, Any]) -> bool:
    """No token differs; in the control rows, whose sums run in another order, some must."""
    return (row["mismatched_tokens"] > 0) == row["control"] and row["tokens"] > 0


def run(device: str, timeout_s: float, only: str = "") -> list[dict[str, Any]]:
    """The rows of all layouts, or of those whose name holds ``only``.

    Raises RuntimeError with a failed rank's output, TimeoutExpired past the deadline.
    """
    with tempfile.TemporaryDirectory() as folder:
        # -P: without it the script's folder would come first on sys.path, and with it names like `kernels`
        worker = Path(__file__).with_name("layout_ranks.py")
        command = [sys.executable, "-P", "-W", "ignore", str(worker), device, folder, str(RANKS), only]
        # a session of its own, to end every rank with it
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            raise RuntimeError(f"the ranks ended with {process.returncode}:\n{output[-3000:]}")
        return json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for people; the gradient is compared with the same tokens' on one rank."""
    out = [f"{'model':10} {'layout':50} {'tokens':>7} {'mismatched':>10}  gradient, largest relative difference"]
    for row in rows:
        difference = row["gradient"]
        gradient = "" if difference is None else "equal bits" if difference == 0 else f"{difference:.1e}"
        out.append(f"{row['model']:10} {row['layout']:50} {row['tokens']:7} {row['mismatched_tokens']:10}  {gradient}")
    return out


if __name__ == "__main__":
    main()
