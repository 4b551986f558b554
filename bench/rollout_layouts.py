"""SGLang on several ranks against Megatron on one: the rows of `layouts.py` that compare the two engines.

SGLang samples, Megatron's training forward scores the same tokens, with the same number of row-parallel segments.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zerokl.alignment.megatron.layout import Layout
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.sglang import EngineConfig, RolloutEngine
from zerokl.alignment.types import Generation, Request, SamplingParams
from zerokl.alignment.verify import compare
from zerokl.bench.layout_ranks import MODELS, VOCABULARY, make_model
from zerokl.orchestrate.scoring import score

_CHUNK = 64  # prompts are up to two of it long
_SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 40}, {"temperature": 0.0})


@dataclass(frozen=True)
class Case:
    """``trainer_segments``: what the trainer takes in their place, for the row that must differ."""

    model: str
    tensor: int
    segments: int
    trainer_segments: tuple[int, ...]


CASES = (
    Case("llama", 1, 1, (1,)),
    Case("llama", 1, 2, (2,)),
    Case("llama", 2, 2, (2, 1)),
    Case("llama", 4, 4, (4,)),
    Case("qwen3_moe", 1, 1, (1,)),
    Case("qwen3_moe", 1, 2, (2,)),
    Case("qwen3_moe", 2, 2, (2, 1)),
)


def rows(device: str) -> list[dict[str, Any]]:
    """One row per case and trainer; on `cuda` of the cases for which there are enough GPUs. An engine starts for each.

    Raises what `RolloutEngine` raises.
    """
    ranks = torch.cuda.device_count() if device == "cuda" else max(case.tensor for case in CASES)
    with tempfile.TemporaryDirectory() as folder:
        made = {name: make_model(Path(folder) / name, MODELS[name]) for name in {case.model for case in CASES}}
        return [row for case in CASES if case.tensor <= ranks for row in _compared(case, made[case.model], device)]


def _compared(case: Case, model: Path, device: str) -> Iterator[dict[str, Any]]:
    began, requests = time.perf_counter(), _requests()
    generations = _generate(case, model, requests)
    for segments in case.trainer_segments:
        policy = MegatronPolicy(model, layout=Layout(segments=segments), threads=1, device=device)
        found = compare(generations, score(policy, requests, generations))
        control = segments != case.segments
        name = f"SGLang TP {case.tensor}, segments {case.segments}"
        yield {
            "model": case.model,
            "layout": f"{name}: trainer {segments}" if control else name,
            "tokens": found.tokens,
            "mismatched_tokens": found.mismatched_tokens,
            "gradient": None,
            "control": control,
            "seconds": time.perf_counter() - began,
        }


def _generate(case: Case, model: Path, requests: list[Request]) -> list[Generation]:
    config = EngineConfig(
        str(model),
        context_length=2 * _CHUNK,
        chunked_prefill_size=_CHUNK,
        tensor_parallel=case.tensor,
        segments=case.segments,
        threads=case.tensor,
    )
    with RolloutEngine(config, start_timeout_s=600) as engine:
        return engine.generate(requests, timeout_s=600)


def _requests() -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 2 * _CHUNK - 16))),
            SamplingParams(max_new_tokens=16, seed=index, ignore_eos=True, **_SAMPLINGS[index % 4]),
        )
        for index in range(24)
    ]
