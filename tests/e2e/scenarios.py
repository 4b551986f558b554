"""Run in a process of its own: `python scenarios.py MODEL OUT.json`. One engine, one policy, every scenario on both.

Megatron keeps global state and SGLang's crashes take their parent along, so neither belongs into pytest's process.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.moe_faults import sparse_layers
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.routing_replay import Mode
from zerokl.alignment.sglang.engine import EngineConfig, RolloutEngine
from zerokl.alignment.types import PackedBatch, Request, SamplingParams
from zerokl.alignment.verify import compare
from zerokl.orchestrate import faults
from zerokl.orchestrate.scoring import score
from zerokl.orchestrate.verify import connect
from zerokl.orchestrate.weights import Meeting, WeightLink

CHUNK = 64
VOCAB = 300  # ids that all test models have
# the last one changes a bias that not every model has, and stays in the policy
ROUTER_FAULTS: tuple[faults.Fault, ...] = ("replay-shift", "routing-slots", "combine-order", "tie-break", "stale-bias")


def requests(
    count: int, *, seed: int, lengths=(1, 60), new: int = 8, every_s: float = 0.0, **sampling
) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        ids = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(*lengths)))
        params = SamplingParams(max_new_tokens=new, seed=rng.randrange(2**31), ignore_eos=True, **sampling)
        made.append(Request(ids, params, index * every_s))
    return made


def with_prefix(prefix: tuple[int, ...], made: list[Request]) -> list[Request]:
    return [Request((*prefix, *r.input_ids), r.sampling, r.arrival_s) for r in made]


def train_and_sync(policy: MegatronPolicy, engine: RolloutEngine, link: WeightLink, made: list[Request]) -> dict:
    """One optimizer step on what the engine sampled, then the new weights into the engine."""
    batch = PackedBatch.pack(made, engine.generate(made, timeout_s=300))
    before = policy.weights_digest()
    policy.train_step([batch], lambda logprobs, _: -logprobs.mean())
    changed = sum(before[name] != digest for name, digest in policy.weights_digest().items())
    assert changed > len(before) // 2, f"the step changed {changed} of {len(before)} tensors"
    report = link.sync("1", timeout_s=300)
    return {"bytes": report.bytes, "copied": report.copied_bytes, "by_engine": report.copied_by_engines}


def router_faults(config: ModelConfig) -> tuple[faults.Fault, ...]:
    if config.moe is None:
        return ()
    return ROUTER_FAULTS if config.moe.router.bias else ROUTER_FAULTS[:-1]


def main(model: str, out: Path) -> None:
    torch.manual_seed(0)
    meeting = Meeting.in_folder(Path(tempfile.mkdtemp(dir=out.parent)))
    architecture = ModelConfig.load(model)
    sparse = architecture.moe is not None
    config = EngineConfig(
        model, chunked_prefill_size=CHUNK, context_length=400, max_running_requests=32, capture_experts=sparse,
        transfer=meeting.transfer(),
    )  # fmt: skip
    policy = MegatronPolicy(
        model, optimizer=OptimizerSettings(learning_rate=1e-4), replay="check" if sparse else "off", recompute=sparse
    )
    results, injected = {}, {}
    modes: tuple[Mode, ...] = ("off", "on", "check") if sparse else ()  # the last one stays
    with connect(meeting, policy) as link, RolloutEngine(config, start_timeout_s=300) as engine:
        link.sync("0", timeout_s=300)

        def check(name: str, made: list[Request], fault: faults.Fault | None = None) -> None:
            generations = faults.damage_records(fault, engine.generate(made, timeout_s=300))
            before = policy.differing_tokens
            found = compare(generations, score(policy, made, generations))
            (injected if fault else results)[name] = found.to_json() | {
                "equal": found.equal,
                "cached_tokens": sum(g.cached_tokens for g in generations),
                "versions": sorted(set().union(*(g.weight_versions for g in generations))),
                "expected_tokens": sum(r.sampling.max_new_tokens for r in made),
                "differing_tokens": policy.differing_tokens - before,
            }

        def check_turns(name: str) -> None:
            """Conversations: each turn's prompt is everything before it and some more; scored as one sequence each."""
            made, said = requests(4, seed=65), []
            for turn in range(3):
                said.append((made, engine.generate(made, timeout_s=300)))
                more = requests(4, seed=66 + turn, lengths=(1, 9))
                made = [
                    Request((*r.input_ids, *g.output_ids, *m.input_ids), m.sampling)
                    for r, g, m in zip(*said[-1], more, strict=True)
                ]
            samples = [[(rs[i], gs[i]) for rs, gs in said] for i in range(4)]
            generations = [g for turns in samples for _, g in turns]
            before = policy.differing_tokens
            scored = policy.logprobs(PackedBatch.pack_turns(samples)).detach().numpy()
            ends = np.cumsum([len(g.output_ids) for g in generations])[:-1]
            found = compare(generations, np.split(scored, ends))
            results[name] = found.to_json() | {
                "equal": found.equal,
                "expected_tokens": 3 * 4 * 8,
                "cached_tokens": sum(g.cached_tokens for g in generations),
                "differing_tokens": policy.differing_tokens - before,
            }

        for count in (1, 2, 7, 32):
            check(f"batch {count}", requests(count, seed=count))
        check("longer than a prefill chunk", requests(2, seed=50, lengths=(3 * CHUNK + 5, 3 * CHUNK + 9)))
        prefix = requests(1, seed=51, lengths=(100, 100))[0].input_ids
        engine.generate(with_prefix(prefix, requests(1, seed=52)), timeout_s=300)
        check("prefix-cache hit", with_prefix(prefix, requests(4, seed=53)))
        check("temperature 0.6", requests(4, seed=54, temperature=0.6))
        check("temperature 1.7, top-p 0.8", requests(4, seed=55, temperature=1.7, top_p=0.8))
        check("top-k 20, top-p 0.9", requests(4, seed=56, top_k=20, top_p=0.9))
        check("greedy", requests(4, seed=57, temperature=0.0))
        check("arrivals while others decode", requests(10, seed=58, new=16, every_s=0.05))
        for mode in modes:
            policy.replay = mode
            check(f"replay {mode}", requests(8, seed=64))
        check_turns("three turns")
        sent = train_and_sync(policy, engine, link, requests(4, seed=59))
        check("after a step and a weight sync", requests(8, seed=60))
        same = engine.weights_digest(timeout_s=60) == policy.weights_digest()
        check("after the weight sync, warm prefix", with_prefix(prefix, requests(4, seed=53)))
        for fault in router_faults(architecture):
            policy.replay = "check" if fault == "replay-shift" else "off"
            faults.plant(fault, engine, policy, lambda: link.sync("ties", timeout_s=300))
            check(fault, requests(24, seed=63, new=12), fault)
            for layer in sparse_layers(policy.model):
                layer.__dict__.pop("topk", None)  # the router of the class again
        policy.replay = "off"
        # an engine that missed the update must be found out
        policy.train_step([PackedBatch.pack(*_sampled(engine))], lambda logprobs, _: -logprobs.mean())
        check("engine one step behind", requests(4, seed=61))
    out.write_text(
        json.dumps(
            {
                "scenarios": results,
                "digests_equal_after_sync": same,
                "sent": sent,
                "architecture": architecture.architecture,
                "faults": injected,
                "hooks": {row["hook"]: row["calls"] for row in engine.manifest()["hooks"]["hooks"]},
            }
        )
    )


def _sampled(engine: RolloutEngine):
    made = requests(2, seed=62)
    return made, engine.generate(made, timeout_s=300)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
