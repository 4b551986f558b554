"""Forward and backward of Megatron-Core on `zerokl.kernels` against Megatron's own local layers, in one run.

    python -m zerokl.bench.megatron_speed --model smollm2-135m

Every token is scored. Each side runs in its own process (Megatron keeps global state); rounds alternate between the
two, so that a machine that slows down slows both. Reported is the median round, and beside wall time the processor
time of the whole process, which other work on the machine disturbs less (exact with --threads 1).

Stock bf16 products run two to four times as fast on processors with bf16 dot products (the flag avx512_bf16) as on
those without. ``--stock-isa AVX512_CORE`` measures the stock layers as on one without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from zerokl.alignment.openmp import PASSIVE

if TYPE_CHECKING:
    from zerokl.alignment.types import PackedBatch

LAYERS = ("zerokl", "stock")


def main() -> None:
    options = _parse(sys.argv[1:])
    if options.worker:
        return _work(options)
    return _compare(options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zerokl.bench.megatron_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder of a Hugging Face model")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=80, help="tokens of every sequence")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stock-isa", metavar="ISA", help="limit oneDNN to this instruction set on the stock side")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one round may take")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", choices=LAYERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _compare(options: argparse.Namespace) -> None:
    from zerokl.orchestrate.models import resolve

    options.model = str(resolve(options.model))
    workers = {layers: _start(options, layers) for layers in LAYERS}
    seconds: dict[str, list[list[float]]] = {layers: [] for layers in LAYERS}
    try:
        for index in range(options.rounds + 1):
            for layers, worker in workers.items():
                times = _round(worker, layers)
                if index:  # the first warms up
                    seconds[layers].append(times)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    _report(options, seconds)


def _start(options: argparse.Namespace, layers: str) -> subprocess.Popen[str]:
    # -P: without it the script's folder would come first on sys.path, and with it names like `kernels`
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--worker", layers, "--model", options.model]
    command += ["--timeout", str(options.timeout)]
    for name in ("sequences", "length", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = (PASSIVE if layers == "zerokl" else {}) | os.environ
    if layers == "stock" and options.stock_isa:
        environment["ONEDNN_MAX_CPU_ISA"] = options.stock_isa  # oneDNN offers no other way to ask
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _round(worker: subprocess.Popen[str], layers: str) -> list[float]:
    """Ask the worker for one round; it answers with its seconds, or ends when its own deadline passes."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"the {layers} worker ended without an answer (exit code {worker.wait(10)}); see its output")
    return json.loads(answer)


def _work(options: argparse.Namespace) -> None:
    import faulthandler

    from zerokl.alignment.megatron.optimizer import OptimizerSettings
    from zerokl.alignment.megatron.policy import MegatronPolicy

    faulthandler.dump_traceback_later(options.timeout, exit=True)  # the deadline of building
    settings = OptimizerSettings(learning_rate=0.0)
    policy = MegatronPolicy(options.model, optimizer=settings, stock=options.worker == "stock", threads=options.threads)
    batch = _batch(policy.config.vocab_size, options.sequences, options.length)
    faulthandler.cancel_dump_traceback_later()
    for _ in sys.stdin:
        faulthandler.dump_traceback_later(options.timeout, exit=True)  # the deadline of one round
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = -policy.logprobs(batch).mean()
        forward = time.perf_counter()
        loss.backward()
        end, cpu = time.perf_counter(), time.process_time() - start_cpu
        policy.train_step([batch], lambda logprobs, _: -logprobs.mean())
        print(json.dumps([forward - start, end - forward, cpu, time.perf_counter() - end]), flush=True)
        faulthandler.cancel_dump_traceback_later()


def _batch(vocabulary: int, sequences: int, length: int) -> PackedBatch:
    """Random sequences whose every token but the first is a target (and one more, so that all rows are scored)."""
    import numpy as np

    from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams

    rng = np.random.default_rng(0)
    nothing = np.zeros(length, np.float32)
    requests, generations = [], []
    for _ in range(sequences):
        ids = rng.integers(0, vocabulary, length + 1).tolist()
        requests.append(Request(tuple(ids[:1]), SamplingParams()))
        generations.append(Generation(tuple(ids[1:]), nothing, nothing, "length", "0"))
    return PackedBatch.pack(requests, generations)


def _report(options: argparse.Namespace, seconds: dict[str, list[list[float]]]) -> None:
    tokens = options.sequences * options.length
    figures: dict[str, dict[str, float]] = {}
    for layers, rounds in seconds.items():
        forward, backward, cpu, step = (statistics.median(column) for column in zip(*rounds, strict=True))
        both = statistics.median(times[0] + times[1] for times in rounds)
        figures[layers] = {
            "forward_s": forward,
            "backward_s": backward,
            "cpu_s": cpu,
            "train_step_s": step,
            "tokens_per_s": tokens / both,
            "train_tokens_per_s": tokens / step,
        }
    ratio = figures["zerokl"]["tokens_per_s"] / figures["stock"]["tokens_per_s"]
    cpu_ratio = figures["stock"]["cpu_s"] / figures["zerokl"]["cpu_s"]
    result = {
        "command": shlex.join([Path(sys.executable).name, "-m", "zerokl.bench.megatron_speed", *sys.argv[1:]]),
        "machine": _machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "zerokl")},
        "batch": f"{options.sequences} x {options.length} tokens, all scored, {options.threads} threads",
        "figures": figures,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
    }
    for key in ("command", "machine", "versions", "batch"):
        print(f"{key}: {result[key]}")
    for layers, values in figures.items():
        shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        print(f"{layers:>7}: {shown}")
    print(f"forward + backward: {ratio:.2f} times stock by wall time, {cpu_ratio:.2f} times by processor time")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    processor = names[0] if names else platform.processor()
    return f"{processor}, {os.cpu_count()} cores, {' '.join(units)}, {platform.platform()}"


if __name__ == "__main__":
    main()
