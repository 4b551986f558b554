"""Run in a process of its own: `python stock_replay.py MODEL OUT.json`. Both engines' own kernels, replayed or not."""

import json
import sys
from pathlib import Path

import numpy as np

from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.sglang.engine import EngineConfig, RolloutEngine
from zerokl.alignment.types import Request, SamplingParams
from zerokl.alignment.verify import compare
from zerokl.orchestrate.scoring import score


def main(model: str, out: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 300, rng.integers(1, 61)).tolist()) for _ in range(32)]
    made = [Request(ids, SamplingParams(24, seed=index, ignore_eos=True)) for index, ids in enumerate(prompts)]
    policy = MegatronPolicy(model, stock=True)
    with RolloutEngine(EngineConfig(model, stock=True, capture_experts=True), start_timeout_s=300) as engine:
        generations = engine.generate(made, timeout_s=300)
    found = {}
    for mode in ("off", "on", "check"):
        policy.replay, before = mode, policy.differing_tokens
        scored = score(policy, made, generations)
        difference = np.concatenate([g.logprobs - s for g, s in zip(generations, scored, strict=True)])
        found[mode] = compare(generations, scored).to_json() | {
            "mean_abs_diff": float(np.abs(difference).mean()),
            "differing_tokens": policy.differing_tokens - before,
        }
    found["fed_tokens"] = sum(len(r.input_ids) + len(g.output_ids) - 1 for r, g in zip(made, generations, strict=True))
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
