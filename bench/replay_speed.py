"""What routing replay costs: training steps of a sparse model with it against the same steps without, in one run.

    zerokl model tiny qwen3_moe --out models/tiny-qwen3-moe
    python -m zerokl.bench.replay_speed --model models/tiny-qwen3-moe

One policy trains on one batch of random tokens, without records (off) and with those of its own choice (on, check), so
that all do the same arithmetic. A step is the check of the records, packing, forward, backward and update. Steps
alternate, each round in another order, so that a machine that slows down slows all; reported is the median of each
round's own ratio to off, by wall time and by processor time, which other work on the machine disturbs less.

Beside it: the bytes that a record of this model takes for each token, against SGLang's own form of it, int32 indices of
all layers as base64 in JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from zerokl import kernels
from zerokl.alignment.megatron.moe_faults import Topk, sparse_layers
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.routing import Router
from zerokl.alignment.routing_replay import Mode, record_dtype
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams
from zerokl.bench.machine import describe
from zerokl.orchestrate.samples import Sample
from zerokl.orchestrate.scoring import check_routing

MODES: tuple[Mode, ...] = get_args(Mode)
Seconds = dict[Mode, list[tuple[float, float]]]
"""mode -> rounds of (wall seconds, processor seconds)."""


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
    plain = _samples(policy.config.vocab_size, options)
    recorded = _with_records(policy, plain)
    seconds: Seconds = {mode: [] for mode in MODES}
    for index in range(options.rounds + 1):
        for mode in MODES[index % 3 :] + MODES[: index % 3]:
            taken = _step(policy, mode, plain if mode == "off" else recorded)
            if index:  # the first round warms up
                seconds[mode].append(taken)
    if policy.differing_tokens:
        sys.exit(f"{policy.differing_tokens} tokens were routed otherwise than recorded: the times do not compare")
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


def _samples(vocabulary: int, options: argparse.Namespace) -> list[Sample]:
    """Random sequences, every token but the first a target."""
    rng = np.random.default_rng(0)
    zeros = np.zeros(options.length, np.float32)
    samples = []
    for _ in range(options.sequences):
        ids = rng.integers(0, vocabulary, options.length + 1).tolist()
        generation = Generation(tuple(ids[1:]), zeros, zeros, "length", "0")
        samples.append(Sample(None, Request(tuple(ids[:1]), SamplingParams()), generation))
    return samples


def _with_records(policy: MegatronPolicy, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the experts that the policy chooses by itself."""
    assert policy.config.moe is not None
    chosen: dict[int, torch.Tensor] = {}
    layers = sparse_layers(policy.model)
    for layer in layers:
        layer.__dict__["topk"] = partial(_record, chosen, layer.layer, layer.topk)
    batch = _pack(samples)
    policy.logprobs(batch)
    for layer in layers:
        del layer.__dict__["topk"]
    records = torch.stack([chosen[layer] for layer in sorted(chosen)], 1).numpy()
    parts = np.split(records.astype(record_dtype(policy.config.moe.router)), batch.cu_seqlens[1:-1].numpy())
    return [
        replace(sample, generation=replace(sample.generation, routed_experts=part))
        for sample, part in zip(samples, parts, strict=True)
    ]


def _record(chosen: dict[int, torch.Tensor], layer: int, topk: Topk, logits: torch.Tensor) -> kernels.Routing:
    routing = topk(logits)
    chosen[layer] = routing.indices
    return routing


def _pack(samples: Sequence[Sample]) -> PackedBatch:
    return PackedBatch.pack([s.request for s in samples], [s.generation for s in samples])


def _step(policy: MegatronPolicy, mode: Mode, samples: Sequence[Sample]) -> tuple[float, float]:
    """(wall seconds, processor seconds) of one training step in this mode."""
    policy.replay = mode
    start, start_cpu = time.perf_counter(), time.process_time()
    check_routing(policy, samples)
    policy.train_step([_pack(samples)], lambda logprobs, _: -logprobs.mean())
    return time.perf_counter() - start, time.process_time() - start_cpu


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
    step = {mode: statistics.median(wall for wall, _ in times) for mode, times in seconds.items()}
    overhead = {mode: _overhead(times, seconds["off"]) for mode, times in seconds.items()}
    result = {
        "machine": describe("megatron-core"),
        "batch": f"{options.sequences} x {options.length} tokens, {options.rounds} rounds",
        "step_s": step,
        "overhead": {mode: {"wall": wall, "cpu": cpu} for mode, (wall, cpu) in overhead.items()},
        "bytes_per_token": {"packed": packed, "base64_int32_json": text},
    }
    print(result["machine"])
    print(f"batch:    {result['batch']}; {router.sparse_layers} sparse layers, {router.top_k} of {router.experts}")
    for mode in MODES:
        wall, cpu = overhead[mode]
        print(
            f"{mode:>8}: {step[mode] * 1e3:.1f} ms a step, {tokens / step[mode]:.0f} tokens/s; "
            f"over off {wall:+.2%} by wall time, {cpu:+.2%} by processor time"
        )
    print(f"records:  {packed} bytes a token, {text:.1f} as base64 int32 JSON: {text / packed:.1f} times as many")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _overhead(times: list[tuple[float, float]], off: list[tuple[float, float]]) -> tuple[float, float]:
    """What a mode takes beyond off, as parts of off (wall, processor time): medians over pairs of one round."""
    pairs = list(zip(times, off, strict=True))
    wall, cpu = (statistics.median(mode[i] / base[i] for mode, base in pairs) - 1 for i in (0, 1))
    return wall, cpu


if __name__ == "__main__":
    main()
