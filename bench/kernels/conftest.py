"""After the suite's own table: one line a case with rates, the share of the machine's bound and the ratio to torch."""

from __future__ import annotations

import torch

from zerokl.bench.kernels.bounds import measure
from zerokl.bench.machine import describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    seconds = {(b.group, b.params["who"]): b.stats.median for b in session.benchmarks} if session else {}
    cases = {b.group: b.extra_info for b in session.benchmarks} if session else {}
    if not seconds:
        return
    bounds = measure(DEVICE)
    line = terminalreporter.write_line
    line(describe("triton", "pytest-benchmark"))
    line(f"bounds: copy {bounds.bytes_per_s / 1e9:.1f} GB/s, bf16 product {bounds.flops_per_s / 1e12:.2f} TFLOPS")
    line(f"{'case':46} {'us':>9} {'GB/s':>7} {'TFLOPS':>7} {'of bound':>8} {'x torch':>8} {'goal':>5}")
    for group, case in cases.items():
        ours, theirs = seconds.get((group, "zerokl")), seconds.get((group, "torch"))
        if ours is None or theirs is None:
            continue
        least = max(case["bytes"] / bounds.bytes_per_s, case["flops"] / bounds.flops_per_s)
        goal = f"{case['goal']:5.1f}" if case["goal"] else "    -"
        line(
            f"{group:46} {ours * 1e6:9.1f} {case['bytes'] / ours / 1e9:7.2f} {case['flops'] / ours / 1e12:7.3f} "
            f"{least / ours:8.0%} {theirs / ours:8.2f} {goal}"
        )
