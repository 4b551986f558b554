"""Rollout speed of SGLang on `zerokl.kernels` against SGLang's own CPU kernels, in one run.

    python -m zerokl.bench.sglang_speed --model smollm2-135m

Two engines run side by side and rounds alternate between them, so that a machine that slows down slows both. A round
serves `--batch` random prompts concurrently; reported is the median round in tokens a second, prefill included, and
beside wall time the processor time of the engine's processes, which other work on the machine disturbs less.

Stock bf16 products run two to four times as fast on processors with bf16 dot products (the flag avx512_bf16) as on
those without. ``--stock-isa AVX512_CORE`` measures the stock engine as on one without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zerokl.alignment.sglang import EngineConfig, RolloutEngine
from zerokl.alignment.types import Request, SamplingParams
from zerokl.bench.machine import describe

Figures = dict[str, dict[str, list[tuple[float, float]]]]
"""batch -> engine -> rounds of (wall seconds, processor seconds)."""


def main() -> None:
    options = _parse(sys.argv[1:])
    from zerokl.orchestrate.models import resolve

    model = str(resolve(options.model))
    vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    with ExitStack() as stack:
        engines = {name: stack.enter_context(_start(model, name, options)) for name in ("stock", "zerokl")}
        figures: Figures = {f"batch {size}": {name: [] for name in engines} for size in options.batch}
        for index in range(options.rounds + 1):
            for size in options.batch:
                requests = _requests(size, vocabulary, options, seed=index)
                for name, engine in engines.items():
                    times = _round(engine, requests, options.timeout)
                    if index:  # the first warms up
                        figures[f"batch {size}"][name].append(times)
    _report(options, figures)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zerokl.bench.sglang_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder of a Hugging Face model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests served at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens sampled for every prompt")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stock-isa", metavar="ISA", help="limit oneDNN to this instruction set on the stock side")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one round may take")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(arguments)


def _start(model: str, name: str, options: argparse.Namespace) -> RolloutEngine:
    config = EngineConfig(
        model,
        stock=name == "stock",
        threads=options.threads,
        context_length=options.prompt + options.new,
        max_running_requests=max(options.batch),
    )
    if name == "stock" and options.stock_isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.stock_isa  # oneDNN offers no other way to ask
    try:
        return RolloutEngine(config)
    finally:
        os.environ.pop("ONEDNN_MAX_CPU_ISA", None)


def _requests(size: int, vocabulary: int, options: argparse.Namespace, *, seed: int) -> list[Request]:
    """Random prompts that share no prefix, so that every round prefills them all."""
    rng = random.Random(f"{seed}-{size}")
    return [
        Request(
            tuple(rng.randrange(vocabulary) for _ in range(options.prompt)),
            SamplingParams(max_new_tokens=options.new, seed=index, ignore_eos=True),
        )
        for index in range(size)
    ]


def _round(engine: RolloutEngine, requests: list[Request], timeout_s: float) -> tuple[float, float]:
    """(wall seconds, processor seconds) of one round."""
    before, start = _cpu_seconds(engine.process_group), time.perf_counter()
    engine.generate(requests, timeout_s=timeout_s)
    return time.perf_counter() - start, _cpu_seconds(engine.process_group) - before


def _cpu_seconds(process_group: int) -> float:
    """Processor time used so far by the living processes of a group (Linux)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before may contain spaces
        except FileNotFoundError:
            continue  # it ended meanwhile
        if int(fields[2]) == process_group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _report(options: argparse.Namespace, figures: Figures) -> None:
    sizes = {name: getattr(options, name) for name in ("prompt", "new", "threads")}
    result: dict[str, Any] = {"machine": describe("sglang"), "sizes": sizes, "batches": {}}
    print(result["machine"])
    print(f"requests: prompts of {options.prompt} tokens, {options.new} sampled, {options.threads} threads")
    for batch, engines in figures.items():
        tokens = int(batch.split()[1]) * options.new
        row: dict[str, dict[str, float]] = {}
        for name, times in engines.items():
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            row[name] = {"tokens_per_s": tokens / wall, "cpu_ms_per_token": cpu / tokens * 1e3}
        ratio = row["zerokl"]["tokens_per_s"] / row["stock"]["tokens_per_s"]
        cpu_ratio = row["stock"]["cpu_ms_per_token"] / row["zerokl"]["cpu_ms_per_token"]
        result["batches"][batch] = row | {"ratio": ratio, "cpu_ratio": cpu_ratio}
        speeds = ", ".join(f"{name} {values['tokens_per_s']:.1f} tokens/s" for name, values in row.items())
        print(f"{batch:>9}: {speeds}: {ratio:.2f} times stock by wall time, {cpu_ratio:.2f} times by processor time")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
