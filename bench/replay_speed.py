"""What routing replay costs: training steps of a sparse model with it against the same steps without, in one run.

    zerokl model tiny qwen3_moe --out models/tiny-qwen3-moe
    python -m zerokl.bench.replay_speed --model models/tiny-qwen3-moe

One policy trains on one batch of random tokens and records; a step is the check of the records, packing, and forward,
backward and update. Steps alternate between off, on and check, each round in another order, so that a machine that
slows down slows all; reported is the median of each round's own ratio to off. Beside it: the bytes that a record of
this model takes for each token, against SGLang's own form of it, int32 indices of all layers as base64 in JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.routing import Router
from zerokl.alignment.routing_replay import Mode, record_dtype
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams
from zerokl.bench.machine import describe
from zerokl.orchestrate.samples import Sample
from zerokl.orchestrate.scoring import check_routing

MODES: tuple[Mode, ...] = get_args(Mode)
Seconds = dict[Mode, list[float]]


def main() -> None:
    options = _parse(sys.argv[1:])
    policy = MegatronPolicy(
        options.model,
        optimizer=OptimizerSettings(learning_rate=0.0),
        recompute=options.recompute,
        threads=options.threads,
    )
    if policy.config.moe is None:
        sys.exit(f"{options.model} is dense, it routes nothing: give a mixture-of-experts model")
    router = policy.config.moe.router
    samples = _samples(policy.config.vocab_size, router, options)
    seconds: Seconds = {mode: [] for mode in MODES}
    for index in range(options.rounds + 1):
        for mode in MODES[index % 3 :] + MODES[: index % 3]:
            taken = _step(policy, mode, samples)
            if index:  # the first round warms up
                seconds[mode].append(taken)
    _report(options, router, seconds)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zerokl.bench.replay_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a mixture-of-experts model in Hugging Face form")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of every sequence")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recompute", action="store_true", help="recompute activations: records are read twice")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(arguments)


def _samples(vocabulary: int, router: Router, options: argparse.Namespace) -> list[Sample]:
    """Random sequences with random records: what is in them costs the same."""
    rng = np.random.default_rng(0)
    zeros = np.zeros(options.length, np.float32)
    samples = []
    for _ in range(options.sequences):
        ids = rng.integers(0, vocabulary, options.length + 1).tolist()
        scores = rng.random((options.length, router.sparse_layers, router.experts))
        record = scores.argsort(-1)[..., : router.top_k].astype(record_dtype(router))
        generation = Generation(tuple(ids[1:]), zeros, zeros, "length", "0", routed_experts=record)
        samples.append(Sample(None, Request(tuple(ids[:1]), SamplingParams()), generation))
    return samples


def _step(policy: MegatronPolicy, mode: Mode, samples: Sequence[Sample]) -> float:
    """Seconds of one training step in this mode."""
    policy.replay = mode
    start = time.perf_counter()
    check_routing(policy, samples)
    batch = PackedBatch.pack([s.request for s in samples], [s.generation for s in samples])
    policy.train_step([batch], lambda logprobs, _: -logprobs.mean())
    return time.perf_counter() - start


def bytes_per_token(router: Router) -> tuple[int, float]:
    """(one token of a packed record, the same token as base64 int32 in JSON, over a long sequence)."""
    packed = router.sparse_layers * router.top_k * record_dtype(router).itemsize
    tokens = 1024
    captured = np.zeros((tokens, router.layers, router.top_k), "<i4")
    text = json.dumps({"routed_experts": base64.b64encode(captured.tobytes()).decode()})
    return packed, len(text) / tokens


def _report(options: argparse.Namespace, router: Router, seconds: Seconds) -> None:
    tokens = options.sequences * options.length
    packed, text = bytes_per_token(router)
    overhead = {
        mode: statistics.median(a / b for a, b in zip(seconds[mode], seconds["off"], strict=True)) - 1 for mode in MODES
    }
    result = {
        "machine": describe("megatron-core"),
        "batch": f"{options.sequences} x {options.length} tokens, {options.rounds} rounds",
        "step_s": {mode: statistics.median(times) for mode, times in seconds.items()},
        "overhead": overhead,
        "bytes_per_token": {"packed": packed, "base64_int32_json": text},
    }
    print(result["machine"])
    print(f"batch:    {result['batch']}; {router.sparse_layers} sparse layers, {router.top_k} of {router.experts}")
    for mode in MODES:
        step = statistics.median(seconds[mode])
        print(f"{mode:>8}: {step * 1e3:.1f} ms a step, {tokens / step:.0f} tokens/s, {overhead[mode]:+.2%} of off")
    print(f"records:  {packed} bytes a token, {text:.1f} as base64 int32 JSON: {text / packed:.1f} times as many")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
