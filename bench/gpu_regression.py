"""Every kernel byte-checked and timed on a GPU: python -m zerokl.bench.gpu_regression

Needs torch and triton, nothing else; the repository need not be installed, only kernels/_C.so built. `--rehearse` runs
the same code on the CPU with small sizes and writes nothing. Results go to bench/results/<device>.json.

Checks, per op: the CPU's bytes where the contract gives the same bits on both, else closeness; equal bytes of a row
alone and in a batch; equal bytes in repeated backward passes, at small sizes a thousand of them beside other work on
the GPU; equal bytes of a linear layer with every tile size it may get; single matrix instructions against their model;
device memory that another process opens by handle (this one needs msgspec and xxhash too).
Then times, against torch, the cache emptied before each call. A failed check is recorded, printed and makes the exit
code 1; the figures are written all the same. SHA-256 digests of the rehearsal's outputs are kept in
bench/results/digests-<profile>.json and compared in the tests: bits that change show up there by name.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from zerokl import kernels
from zerokl.bench.regression import cases
from zerokl.bench.regression.case import Case, Tensors, hashed
from zerokl.kernels.contract import CONTRACT_VERSION, CPU
from zerokl.kernels.ops.tensor_core import has_cuda_part

RESULTS = Path(__file__).resolve().parent / "results"
DIGESTS = RESULTS / f"digests-{CPU.name}.json"
CLOSE = 2.0**-6  # of the largest value: bf16 outputs of two profiles


def main() -> int:
    options = _parse()
    device = torch.device("cpu" if options.rehearse else "cuda")
    if device.type == "cuda" and not (torch.cuda.is_available() and find_spec("triton")):
        print("no GPU that torch sees, or no triton; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    kernels.accelerate()
    result: dict[str, Any] = {"about": about(device), "checks": {}, "digests": {}, "times": {}}
    for case in cases(options.rehearse):
        if case.cuda_part and device.type == "cuda" and not has_cuda_part():
            result["checks"][case.name] = ["not run: kernels/_C.so was built without its CUDA part"]
            continue
        began = time.perf_counter()
        result["checks"][case.name], result["digests"][case.name] = check(case, device, options.repeats)
        result["times"][case.name] = measure(case, device, options.rounds)
        print(f"{case.name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    result["checks"]["backward under load"] = under_load(device, options.small_repeats)
    if device.type == "cuda":
        result["checks"]["linear tiles"] = unequal_tiles()
        result["checks"]["cuda ipc"] = shared_memory()
    if not options.rehearse:
        RESULTS.mkdir(exist_ok=True)
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.write_digests:
        DIGESTS.write_text(json.dumps(result["digests"], indent=1) + "\n")
    print(table(result))
    return int(any(problem for problems in result["checks"].values() for problem in problems))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zerokl.bench.gpu_regression", description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, nothing written")
    parser.add_argument("--repeats", type=int, default=20, help="backward passes that must agree, at full size")
    parser.add_argument("--small-repeats", type=int, default=1000, help="the same at small sizes, under load")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each kernel")
    parser.add_argument("--write-digests", action="store_true", help="with --rehearse: keep these digests")
    options = parser.parse_args()
    if options.write_digests and not options.rehearse:
        parser.error("--write-digests belongs to --rehearse")
    return options


def about(device: torch.device) -> dict[str, Any]:
    """Where, when and what."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = [name for name in ("torch", "triton") if find_spec(name)]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "not a checkout",
        "contract": CONTRACT_VERSION,
        "versions": {name: version(name) for name in packages},
        "accelerators": kernels.accelerators(),
        "command": " ".join(["python -m zerokl.bench.gpu_regression", *sys.argv[1:]]),
    }


def check(case: Case, device: torch.device, repeats: int) -> tuple[list[str], str]:
    """What is wrong (nothing, if all is well), and the SHA-256 of the outputs."""
    problems = []
    on_cpu = case.inputs()
    inputs = _to(on_cpu, device)
    outputs = case.run(*inputs)
    expected = case.run(*on_cpu)
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        if case.cross_device:
            if not same_bits(got.cpu(), want):
                problems.append(f"output {index} differs from the CPU's in {_count(got.cpu(), want)} elements")
        elif not (got.cpu().float() - want.float()).abs().max() <= CLOSE * want.float().abs().max():
            problems.append(f"output {index} is not close to the CPU's")
    if case.rows:
        first, *rest = inputs
        for row in {0, first.shape[0] // 2, first.shape[0] - 1}:
            alone = case.run(first[row : row + 1], *rest)
            if not all(same_bits(a[0], b[row]) for a, b in zip(alone, outputs, strict=True)):
                problems.append(f"row {row} alone differs from the same row in a batch")
    problems += _unequal_backward(case, inputs, repeats)
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(output.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return problems, digest.hexdigest()


def _unequal_backward(case: Case, inputs: Tensors, repeats: int) -> list[str]:
    leaves = [t.detach().clone().requires_grad_() if t.dtype == torch.bfloat16 else t for t in inputs]
    output = case.run(*leaves)[0]
    wanted = [t for t in leaves if t.requires_grad]
    if not (wanted and output.requires_grad):
        return []
    grad = torch.ones_like(output)
    first = torch.autograd.grad(output, wanted, grad, allow_unused=True)
    for repeat in range(repeats):
        again = torch.autograd.grad(case.run(*leaves)[0], wanted, grad, allow_unused=True)
        if not all(a is None or same_bits(a, b) for a, b in zip(first, again, strict=True)):
            return [f"backward pass {repeat + 2} differs from the first"]
    return []


def under_load(device: torch.device, repeats: int) -> list[str]:
    """Backward passes at small sizes that differ from the first, while a second stream keeps the GPU busy."""
    problems = []
    for case in cases(small=True):
        inputs = _to(case.inputs(), device)
        if case.cuda_part or not any(t.dtype == torch.bfloat16 for t in inputs):
            continue
        with _busy(device):
            problems += [f"{case.name}: {problem}" for problem in _unequal_backward(case, inputs, repeats)]
    return problems


@contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    a = torch.randn(4096, 4096, device=device).bfloat16()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for _ in range(200):  # products enough to overlap with what follows
            a = (a @ a) * 1e-3
    yield
    torch.cuda.synchronize(device)


def unequal_tiles() -> list[str]:
    """Tiles of a linear layer whose bytes differ from the heuristic's: those it may get, and a spread of others."""
    from zerokl.bench.autotune import candidates
    from zerokl.kernels.triton.linear import matmul
    from zerokl.kernels.triton.linear_config import linear_config

    x, w = hashed(300, 1096, seed=60).cuda(), hashed(1000, 1096, seed=61).cuda()
    first, *others = candidates(300, 1000)
    configs = {linear_config(m, n, 1) for m in (1, 16, 64, 128, 4096) for n in (1000, 4096)}
    outputs = {}
    for config in [first, *configs, *others[:: max(1, len(others) // 24)]]:
        outputs[config] = x.new_empty(300, 1000)
        matmul(x, w.t(), outputs[config], config=config)
    return [f"{config} differs" for config, y in outputs.items() if not same_bits(y, outputs[first])]


def shared_memory() -> list[str]:
    """What is wrong with device memory shared between two processes."""
    missing = [name for name in ("msgspec", "xxhash") if not find_spec(name)]
    if missing:
        return [f"not run: needs {', '.join(missing)}"]
    from zerokl.bench import cuda_ipc

    return cuda_ipc.problems()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Byte equality of two tensors on one device."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _count(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{int((a != b).sum())} of {a.numel()}"


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return tuple(t.to(device) for t in tensors)


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, float]:
    """Median microseconds of ours and torch's, and what they amount to."""
    inputs = _to(case.inputs(), device)
    with torch.no_grad():
        ours = _microseconds(lambda: case.run(*inputs), device, rounds)
        torch_run = case.torch_run
        theirs = _microseconds(lambda: torch_run(*inputs), device, rounds) if torch_run else float("nan")
    return {
        "us": ours,
        "torch_us": theirs,
        "gb_per_s": case.gigabytes / ours * 1e6,
        "tflops": case.teraflops / ours * 1e6,
    }


def _microseconds(call: Any, device: torch.device, rounds: int) -> float:
    call()
    flush = torch.empty(1 << 28 if device.type == "cuda" else 1 << 20, dtype=torch.int8, device=device)
    times = []
    for _ in range(rounds):
        flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def table(result: dict[str, Any]) -> str:
    """What a person reads first: one line a case."""
    lines = [f"{key}: {value}" for key, value in result["about"].items()]
    lines.append(f"{'case':26} {'us':>10} {'GB/s':>8} {'TFLOPS':>8} {'x torch':>8}  checks")
    for name, problems in result["checks"].items():
        t = result["times"].get(name)
        rates = f"{t['gb_per_s']:8.1f} {t['tflops']:8.2f} {t['torch_us'] / t['us']:8.2f}" if t else " " * 26
        lines.append(f"{name:26} {t['us'] if t else math.nan:10.1f} {rates}  {'; '.join(problems) or 'ok'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
